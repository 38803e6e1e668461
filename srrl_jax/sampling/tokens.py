"""Choosing the next token."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.parallel import mesh_axes

_ROWS = 32  # divides the vocabularies of Qwen3 and of others, and is divided by the usual tensor axes


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, applied in the order of `transformers`.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: keep this many most likely tokens; 0 keeps all.
      top_p: then keep the fewest tokens whose probabilities sum to at least this.
      min_p: then keep tokens at least this likely relative to the most likely one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, not {self.min_p}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out, which costs a sort."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@partial(jax.jit, static_argnames=("top_k", "truncates"))
def choose(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    top_k: int,
    truncates: bool,
    allowed: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits: float32 [..., V].
      keys: one random key a row [...].
      temperature, top_p, min_p: scalars, traced, so that a change does not recompile.
      top_k, truncates: of SamplingConfig, static.
      allowed: ids from here on are never chosen (rows of the vocabulary beyond the tokenizer).
    Returns:
      Token ids int32 [...], and their log-probabilities float32 [...] under softmax(logits /
      temperature) without truncation: what training recomputes. Greedy reports temperature 1.
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    values = jnp.where(jnp.arange(logits.shape[-1]) < allowed, scaled, -jnp.inf)
    ids = None
    if truncates:
        size = values.shape[-1]
        values, ids = _top_k(values, min(top_k or size, size))
        probs = jax.nn.softmax(values)
        keep = (jnp.cumsum(probs, -1) - probs < top_p) & (probs >= min_p * probs[..., :1])
        values = jnp.where(keep, values, -jnp.inf)
    # A branch and not a sum with zero noise: greedy decoding pays for no random bits.
    token = jax.lax.cond(greedy, lambda values, _: _first_highest(values), _draw, values, keys)[..., None]
    if ids is not None:
        token = jnp.take_along_axis(ids, token, axis=-1)
    total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    logprob = jnp.take_along_axis(scaled, token, axis=-1) - total
    return token[..., 0].astype(jnp.int32), logprob[..., 0]


def _draw(values: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws from softmax(values [..., V]) with keys [...]: first a column of the values laid out in `_ROWS`
    rows, then one of its rows, each by the highest sum with Gumbel noise.

    Exact, and V / `_ROWS` + `_ROWS` random numbers do; one for each of V takes longer than all the rest.
    """
    pads = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % _ROWS)]
    grid = jnp.pad(values, pads, constant_values=-jnp.inf)
    grid = grid.reshape(*values.shape[:-1], _ROWS, -1)
    columns = grid.shape[-1]
    draw = partial(jax.random.gumbel, shape=(columns + _ROWS,), dtype=jnp.float32)
    for _ in keys.shape:
        draw = jax.vmap(draw)
    noise = draw(keys)
    column = _first_highest(jax.nn.logsumexp(grid, axis=-2) + noise[..., :columns])
    inside = jnp.take_along_axis(grid, column[..., None, None], axis=-1)[..., 0]
    return _first_highest(inside + noise[..., columns:]) * columns + column


def _first_highest(x: jax.Array) -> jax.Array:
    """argmax over the last axis. XLA:CPU takes three times as long for its own, of values with places."""
    place = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(x.shape[-1]), x.shape[-1] - 1)
    return place.min(-1)


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, which alone would gather the rows [N, ...] of all devices on each of them."""
    find = partial(jax.lax.top_k, k=k)
    if rows := mesh_axes("batch", values.shape[0]):
        find = jax.shard_map(find, in_specs=P(rows), out_specs=P(rows))
    return find(values)
