"""Memory and collectives by formula, where there is no compiler for the devices."""

from srrl_jax.models import counts
from srrl_jax.models.counts import Tree
from srrl_jax.parallel import row_shards
from srrl_jax.planning.programs import Compiled, Setup, bytes_here


def estimate(group: str, setup: Setup, trees: dict[str, Tree]) -> list[Compiled]:
    """What `Compiler` would find of the programs of a group, with fused attention and full remat.

    Memory is what lies on a device, what the backward pass keeps, and the working set of one layer;
    collectives are those of fully sharded weights and of tensor parallelism, by ring algorithms.
    """
    # What allocates and moves caches is left out: it costs nothing to speak of.
    counted = ("unstack", "prefill", "decode", "completion_logprobs", "update")
    return [_program(group, program, setup, trees[program]) for program in counted if program in trees]


def _program(group: str, program: str, setup: Setup, tree: Tree) -> Compiled:
    c, mesh, width = setup.model.config, setup.mesh.shape, setup.model.dtype.itemsize
    tensor, rows, passes = mesh["tensor"], row_shards(setup.mesh), setup.microbatches
    weights, moments, beside = map(bytes_here, (setup.params, setup.opt_state, setup.beside(group)))
    acting = width * counts.parameters(c) / (tensor * mesh["expert"])  # of a layout without fsdp
    tokens, slots = tree.tokens / rows, tree.n * tree.b / rows
    cache = tokens * counts.cache_bytes(c, width) / min(tensor, c.num_key_value_heads)
    hidden = tokens * c.hidden_size
    # Two layers' weights, gathered; a layer's residual stream in float32 and its MLP.
    layer = 2 * acting / c.num_hidden_layers + 12 * hidden + 3 * tokens * width * c.intermediate_size / tensor
    logits = 3 * 4 * slots * c.vocab_size / tensor

    gathered = acting * (1 - 1 / mesh["fsdp"])
    # Of one token: two sums of a layer's results over the tensor axis.
    summed = 2 * c.num_hidden_layers * c.hidden_size * width * 2 * (1 - 1 / tensor)
    held = weights + moments + beside
    match program:
        case "unstack":
            extra, sent = acting, {"all-gather": gathered}
        case "prefill":
            extra = acting + cache + layer
            sent = {"all-gather": gathered, "all-reduce": tokens * summed}
        case "decode":
            extra = acting + cache + logits
            sent = {"all-reduce": setup.sampler(group).chunk * slots * summed}
        case "completion_logprobs":
            extra = layer
            sent = {"all-gather": passes * gathered, "all-reduce": passes * tokens * summed}
        case "update":
            kept = hidden * width * c.num_hidden_layers
            extra = 2 * weights + kept + 3 * layer  # gradients of a microbatch and their sum
            sent = {
                "all-gather": passes * 2 * gathered,
                "reduce-scatter": passes * gathered * 4 / width,
                "all-reduce": passes * 3 * tokens * summed,
            }
    sent = {kind: float(size) for kind, size in sent.items() if size}
    return Compiled(f"{group}/{program}", int(held + extra), int(held), sent, "", 0.0)
