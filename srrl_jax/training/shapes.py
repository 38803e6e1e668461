"""The shapes of a run, planned from its rows: nothing is compiled that no row needs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from srrl_jax.models import Qwen3Config, counts
from srrl_jax.models.attention import BLOCK
from srrl_jax.parallel import check_rows, row_shards
from srrl_jax.sampling import RowLengths
from srrl_jax.sampling.shapes import default_budget, round_up
from srrl_jax.training.config import TrainConfig

_SHORT = 256  # completions that are all padded to their limit
_TOKENS = 16384  # of a microbatch on a device, beyond which more are no faster
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
    """Tokens that prompts, and completions, are padded to; and prompts of a microbatch."""

    prompt: int
    completions: tuple[int, ...]
    microbatch: int

    def completion(self, longest: int) -> int:
        """The size for completions of up to `longest` tokens."""
        return next(size for size in self.completions if longest <= size)


def with_responses(rows: Iterable[RowLengths], max_new_tokens: int) -> list[RowLengths]:
    """Rows of the grader, with responses that take some or all of the tokens that they may."""
    lengths = [int(part * max_new_tokens) for part in _RESPONSES]
    return [RowLengths(row.prefix + length, row.branches) for row in rows for length in lengths]


def plan_update(
    config: TrainConfig,
    c: Qwen3Config,
    longest_prompt: int,
    mesh: jax.sharding.Mesh,
    memory: int | None = None,
) -> UpdateShapes:
    """Shapes of the updates of a run: two sizes of completions, and as large a microbatch as fits.

    Args:
      c: sizes of the model.
      longest_prompt: in tokens.
      memory: bytes of a device; of those that are here by default.
    Raises:
      InputError: a minibatch or a microbatch that the mesh cannot cut.
    """
    limit, shards = config.rollout.max_new_tokens, row_shards(mesh)
    completions = tuple(sorted({round_up(limit if limit <= _SHORT else -(-limit // 3)), round_up(limit)}))
    prompt = round_up(longest_prompt)
    prompts = config.prompts_per_step // config.optimizer.minibatches
    if config.optimizer.microbatch is not None:
        check_rows({"optimizer.microbatch": (config.optimizer.microbatch,)}, mesh)
        return UpdateShapes(prompt, completions, config.optimizer.microbatch)
    check_rows({"prompts_per_step / optimizer.minibatches": (prompts,)}, mesh)
    free = (memory or 2 * default_budget()) - _held(config, c, mesh)
    tokens = prompt + config.group_size * completions[-1]
    sizes = [size for size in range(shards, prompts + 1, shards) if prompts % size == 0]
    fitting = [
        size
        for size in sizes
        if size // shards * tokens <= max(_TOKENS, tokens)
        and size // shards * _activations(config, c, prompt, completions[-1], mesh) <= free / 2
    ]
    return UpdateShapes(prompt, completions, max(fitting, default=sizes[0]))


def _held(config: TrainConfig, c: Qwen3Config, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a device that weights, moments, gradients, the reference and the sampler's weights take."""
    parameters = counts.parameters(c)
    first = jnp.dtype(config.optimizer.first_moment).itemsize
    learnt = 4 + 4 + first + 2 * 4  # a float32 weight, its moments, the gradient and the sum of gradients
    frozen = 4 if config.needs_frozen and config.reference == "device" else 0
    of_each = 4 if config.lora.rank else learnt + frozen
    sampling = jnp.dtype(config.dtype).itemsize / (mesh.shape["tensor"] * mesh.shape["expert"])
    cut = mesh.shape["fsdp"] * mesh.shape["tensor"] * mesh.shape["expert"]
    return int(parameters * (of_each / cut + sampling))


def _activations(config: TrainConfig, c: Qwen3Config, prompt: int, completion: int, mesh) -> int:
    """Bytes that a prompt with its group takes on the devices that hold it, forward and backward."""
    width, tensor = jnp.dtype(config.dtype).itemsize, mesh.shape["tensor"]
    tokens = prompt + config.group_size * completion
    inner = counts.widest_mlp(c)
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = width * (8 * c.hidden_size + 4 * inner + 3 * heads) / tensor  # of a token
    scores = 4 * 4 * c.num_attention_heads / tensor * min(BLOCK, completion) * (prompt + completion)
    kept = c.num_hidden_layers * (
        layer if config.optimizer.remat == "none" else width * c.hidden_size / tensor
    )
    return int(tokens * (kept + 2 * layer) + config.group_size * scores)
