"""Memory and collectives by formula, where there is no compiler for the devices."""

from collections import Counter

import jax
import numpy as np

from srrl_jax.models import counts
from srrl_jax.models.counts import Tree
from srrl_jax.parallel import row_shards
from srrl_jax.parallel.chips import GIB
from srrl_jax.planning.groups import Groups, share_outside
from srrl_jax.planning.programs import Compiled, Setup, bytes_here


def estimate(group: str, setup: Setup, trees: dict[str, Tree], island: int) -> list[Compiled]:
    """What `Compiler` would find of the programs of a group, with fused attention and full remat.

    Memory is what lies on a device, what the backward pass keeps, and the working set of one layer;
    collectives are those of fully sharded weights and of tensor parallelism, by ring algorithms.
    """
    # What allocates and moves caches is left out: it costs nothing to speak of.
    counted = ("unstack", "prefill", "decode", "completion_logprobs", "update")
    return [
        _program(group, program, setup, trees[program], island) for program in counted if program in trees
    ]


def _program(group: str, program: str, setup: Setup, tree: Tree, island: int) -> Compiled:
    c, mesh, width = setup.model.config, setup.mesh.shape, setup.model.dtype.itemsize
    tensor, rows, passes = mesh["tensor"], row_shards(setup.mesh), setup.microbatches
    learnt = bytes_here(setup.learnt)
    held = {
        "weights": bytes_here(setup.params),
        "the optimizer's moments": bytes_here(setup.opt_state),
        "weights of the start": bytes_here(setup.beside(group)),
    }
    acting = width * counts.parameters(c) / (tensor * mesh["expert"])  # of a layout without fsdp
    tokens, slots = tree.tokens / rows, tree.n * tree.b / rows
    cache = tokens * counts.cache_bytes(c, width) / min(tensor, c.num_key_value_heads)
    hidden = tokens * c.hidden_size
    # Two layers' weights, gathered; a layer's residual stream in float32, its gathered input and its MLP.
    stream, inner = 12 * hidden / tensor, width * (hidden + 3 * tokens * c.intermediate_size / tensor)
    layer = 2 * acting / c.num_hidden_layers + stream + inner
    logits = 3 * 4 * slots * c.vocab_size / tensor

    gathered = acting * (1 - 1 / mesh["fsdp"])
    # Of one token: two sums of a layer's results over the tensor axis, either in two halves.
    half = 2 * c.num_hidden_layers * c.hidden_size * width * (1 - 1 / tensor)

    def sums(count):
        return [(kind, "tensor", count * half) for kind in ("reduce-scatter", "all-gather")]

    decoding = {"weights of rollouts": acting, "keys and values": cache}
    match program:
        case "unstack":
            extra, sent = {"weights of rollouts": acting}, [("all-gather", "fsdp", gathered)]
        case "prefill":
            extra = decoding | {"one layer": layer}
            sent = [("all-gather", "fsdp", gathered), *sums(tokens)]
        case "decode":
            extra = decoding | {"logits": logits}
            sent = [("all-reduce", "tensor", setup.sampler(group).chunk * slots * 2 * half)]
        case "completion_logprobs":
            extra = {"one layer": layer}
            sent = [("all-gather", "fsdp", passes * gathered), *sums(passes * tokens)]
        case "update":
            extra = {
                "gradients": 2 * learnt,  # of a microbatch, and their sum
                "inputs of all layers": hidden / tensor * width * c.num_hidden_layers,
                "one layer": 3 * layer,
            }
            copies = [axis for axis in mesh if axis not in ("fsdp", "tensor", "expert")]  # of all weights
            sent = [
                ("all-gather", "fsdp", passes * 2 * gathered),
                ("reduce-scatter", "fsdp", passes * (mesh["fsdp"] - 1) * learnt),
                *sums(passes * 3 * tokens),
                *(("all-reduce", axis, passes * 2 * (1 - 1 / mesh[axis]) * learnt) for axis in copies),
            ]
    total: Counter[str] = Counter()
    for kind, _, size in sent:
        total[kind] += size
    outside = sum(size * share_outside(kind, _groups(setup.mesh, axis), island) for kind, axis, size in sent)
    parts = held | extra
    largest = max(parts, key=parts.get)
    return Compiled(
        f"{group}/{program}", int(sum(parts.values())), sum(held.values()),
        {kind: float(size) for kind, size in total.items() if size}, float(outside),
        f"{largest} ({parts[largest] / GIB:.2f} GiB)", 0.0,
    )  # fmt: skip


def _groups(mesh: jax.sharding.Mesh, axis: str) -> Groups:
    """Devices along a mesh axis, by their place in the mesh."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    rows = np.moveaxis(ids, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return tuple(map(tuple, rows.tolist()))
