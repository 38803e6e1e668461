"""The shapes of a run, planned from its rows: nothing is compiled that no row needs."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.kernels.attention import BLOCK
from srrl_jax.models import Qwen3, Qwen3Config, counts
from srrl_jax.parallel import check_rows, platform, row_shards
from srrl_jax.sampling import RowLengths
from srrl_jax.sampling.shapes import default_budget, round_up
from srrl_jax.training.config import TrainConfig

_SHORT = 256  # completions that are all padded to their limit
_TOKENS = 16384  # of a microbatch on a device, beyond which more are no faster
_SHARE = 0.9  # of a device's memory that sampling may fill, since what fits is found by formulas;
_UPDATE_SHARE = 0.85  # that of an update leaves out what a mesh gathers
_ENOUGH = 4096  # of a microbatch on a device, beyond which it is worth less than not to compute twice
_RESPONSES = (0.125, 0.25, 0.5, 1.0)  # of the limit: lengths that nobody knows yet


class RunLengths(NamedTuple):
    """Lengths of what a run samples and grades.

    Attributes:
      rollout, grading: of the rows of both samplers.
      shared: tokens that all prompts of the grader begin with.
    """

    rollout: Sequence[RowLengths]
    grading: Sequence[RowLengths]
    shared: tuple[int, ...] = ()

    @property
    def longest_prompt(self) -> int:
        return max(row.prefix for row in self.rollout)


class UpdateShapes(NamedTuple):
    """Tokens that prompts, and completions, are padded to; prompts of a microbatch; and what its backward
    pass computes again (`optimizer.remat`)."""

    prompt: int
    completions: tuple[int, ...]
    microbatch: int
    remat: Literal["none", "full", "dots"] = "full"

    def completion(self, longest: int) -> int:
        """The size for completions of up to `longest` tokens."""
        return next(size for size in self.completions if longest <= size)


def with_responses(rows: Iterable[RowLengths], max_new_tokens: int) -> list[RowLengths]:
    """Rows of the grader, with responses that take some or all of the tokens that they may."""
    lengths = [int(part * max_new_tokens) for part in _RESPONSES]
    return [RowLengths(row.prefix + length, row.branches) for row in rows for length in lengths]


def plan_update(
    config: TrainConfig,
    model: Qwen3,
    longest_prompt: int,
    mesh: jax.sharding.Mesh,
    memory: int | None = None,
) -> UpdateShapes:
    """Shapes of the updates of a run: two sizes of completions, and what fits of microbatch and remat.

    Of the ways to compute less again the first that leaves room for a microbatch large enough to fill a
    device; with it, as large a microbatch as fits and is of use.

    Args:
      model: its structure, with its adapters.
      longest_prompt: in tokens.
      memory: bytes of a device; of those that are here by default.
    Raises:
      InputError: a minibatch or a microbatch that the mesh cannot cut.
    """
    o, limit, shards = config.optimizer, config.rollout.max_new_tokens, row_shards(mesh)
    completions = tuple(sorted({round_up(limit if limit <= _SHORT else -(-limit // 3)), round_up(limit)}))
    prompt, prompts = round_up(longest_prompt), config.prompts_per_step // o.minibatches
    if o.microbatch is None:
        check_rows({"prompts_per_step / optimizer.minibatches": (prompts,)}, mesh)
        sizes = [size for size in range(shards, prompts + 1, shards) if prompts % size == 0]
    else:
        check_rows({"optimizer.microbatch": (o.microbatch,)}, mesh)
        sizes = [o.microbatch]
    tokens = prompt + config.group_size * completions[-1]  # of a prompt and its group
    useful = [size for size in sizes if size == sizes[0] or size // shards * tokens <= _TOKENS]
    memory = _UPDATE_SHARE * (memory or 2 * default_budget())

    def fits(size: int, remat: str) -> bool:
        each = _activations(config, model.config, prompt, completions[-1], remat, mesh)
        return _held(config, model, mesh, sampling=False) + size // shards * each <= memory

    for remat in ("none", "dots", "full") if o.remat == "auto" else (o.remat,):
        # Where no size fits by the formula, the compiler has the last word.
        largest = max((size for size in useful if fits(size, remat)), default=0)
        if largest == useful[-1] or largest // shards * tokens >= _ENOUGH:
            break
    return UpdateShapes(prompt, completions, largest or sizes[0], remat)


def sampling_budget(
    config: TrainConfig, model: Qwen3, mesh: jax.sharding.Mesh, memory: int | None = None
) -> float:
    """GB of a device that sampling may take beside what training holds there.

    Args:
      memory: bytes of a device; of those that are here by default, half of it on a CPU.
    Raises:
      InputError: nothing is left.
    """
    memory = memory or 2 * default_budget()
    held = _held(config, model, mesh, sampling=True)
    if held >= _SHARE * memory:
        raise InputError(
            f"model: its weights, moments and reference take {held / 1e9:.3g} GB of a device that has "
            f"{memory / 1e9:.3g}, which leaves nothing to sample with; set optimizer.first_moment=bfloat16, "
            "optimizer.moments=host, reference=host or lora.rank, or a larger mesh.fsdp or mesh.tensor"
        )
    free = _SHARE * memory - held
    return (min(free, memory / 2) if platform() == "cpu" else free) / 1e9


def _held(config: TrainConfig, model: Qwen3, mesh: jax.sharding.Mesh, sampling: bool) -> int:
    """Bytes of a device that weights, moments and the reference take while it samples, or in an update with
    the gradients."""
    o, computed = config.optimizer, model.dtype.itemsize
    adapters, rest = (
        sum(x.size for x in jax.tree.leaves(part)) for part in nnx.split(model, nnx.LoRAParam, ...)[1:]
    )
    learnt, base = (adapters, rest) if config.lora.rank else (rest, 0)
    moments = 0 if sampling and o.moments == "host" else 4 + jnp.dtype(o.first_moment).itemsize
    frozen = computed if config.needs_frozen and config.reference == "device" else 0
    # Weights are learnt in float32, and sampled with in another type.
    more = (computed if computed < 4 and not base else 0) if sampling else 4
    cut = mesh.shape["tensor"] * mesh.shape["expert"]
    held = (learnt * (4 + moments + frozen + more) + base * computed) // (cut * mesh.shape["fsdp"])
    if not sampling:
        return held
    c = model.config
    matrices = counts.layer_weights(c) if c.moe is None else 0  # that may be of 8 bits
    for in_8_bits in {config.rollout.int8 != "none", config.grading.int8 != "none"}:
        decoded = rest * computed - (matrices * (computed - 1) if in_8_bits else 0)
        held += decoded // cut
    return held


def _activations(config: TrainConfig, c: Qwen3Config, prompt: int, completion: int, remat: str, mesh) -> int:
    """Bytes that a prompt with its group takes on the devices that hold it, forward and backward."""
    width, tensor = jnp.dtype(config.dtype).itemsize, mesh.shape["tensor"]
    tokens = prompt + config.group_size * completion
    inner, hidden = counts.widest_mlp(c), c.hidden_size
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    # Numbers of a token that are kept of a layer, and that its backward pass has beside; the former were
    # fitted to what the compiler for an H100 says of 0.6B and 4B.
    kept = {
        "none": 8 * hidden + 9 * inner + 4 * heads,
        "dots": 3 * hidden + 2 * inner + heads,
        "full": hidden,
    }[remat]
    layer = 8 * hidden + 4 * inner + 3 * heads
    scores = 4 * 4 * c.num_attention_heads * min(BLOCK, completion) * (prompt + completion)
    each = width * (c.num_hidden_layers * kept + 2 * layer)
    return (tokens * each + config.group_size * scores) // tensor
