"""The unembedding without the logits: log-probabilities and entropies, chunk by chunk."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srrl_jax.parallel import mesh_axes

# Tokens and vocabulary rows whose logits exist at one time (measured by scripts/bench_head.py).
_TOKENS, _VOCAB = 512, 2048
_NEVER = -1e30  # finite: a chunk without any allowed id yields no NaN, and the next one erases it


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array = 1.0,
    allowed: int | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of target tokens, and entropies, of softmax(hidden @ head.T / temperature).

    The softmax runs online over chunks of the vocabulary, in float32, for a chunk of tokens at a time;
    the backward pass computes each chunk's logits again. Under a mesh whose axes cut `head`, each device
    holds its own part of the vocabulary, and its rows are gathered over fsdp once, a chunk at a time.

    Args:
      hidden: [N, B, T, hidden], states that predict `targets`.
      head: [V, hidden]; it is multiplied in the dtype of `hidden`, its gradient adds up in float32.
      targets: int [N, B, T], below `allowed`.
      temperature: a constant; no gradient flows into it.
      allowed: ids from here on have no probability (the tokenizer's size); default: all have.
    Returns:
      float32 log-probabilities and entropies (nats), each [N, B, T].
    """
    allowed = head.shape[0] if allowed is None else allowed
    scale = jax.lax.stop_gradient(1.0 / jnp.asarray(temperature, jnp.float32))
    return _logprobs(hidden, head, targets, scale, jnp.asarray(allowed, jnp.int32))


@jax.custom_vjp
def _logprobs(hidden, head, targets, scale, allowed):
    return _forward(hidden, head, targets, scale, allowed)[0]


def _forward(hidden, head, targets, scale, allowed):
    cut = _Cut.of(hidden, head)
    run = cut.over_devices(
        functools.partial(_local_forward, cut), (cut.rows, cut.head, cut.rows, P(), P()), (cut.rows,) * 3
    )
    logprobs, entropy, total = run(hidden, head, targets, scale, allowed)
    return (logprobs, entropy), (hidden, head, targets, scale, allowed, total, entropy)


def _backward(saved, gradients):
    cut = _Cut.of(*saved[:2])
    rows = cut.rows
    run = cut.over_devices(
        functools.partial(_local_backward, cut),
        (rows, cut.head, rows, P(), P(), rows, rows, rows, rows),
        (rows, cut.head),
    )
    return *run(*saved, *gradients), None, None, None


_logprobs.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """How the mesh cuts rows of tokens, and the head's vocabulary and embedding axes."""

    batch: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]

    @classmethod
    def of(cls, hidden, head) -> "_Cut":
        batch, vocab = mesh_axes("batch", hidden.shape[0]), mesh_axes("vocab", head.shape[0])
        # Devices that see the same rows would count their gradient twice.
        return cls(batch, vocab, mesh_axes("embed", head.shape[1]) if batch else ())

    @property
    def rows(self) -> P:
        return P(self.batch or None)

    @property
    def head(self) -> P:
        return P(self.vocab or None, self.embed or None)

    def over_devices(self, function, in_specs, out_specs):
        if not any(self):
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def gather(self, weight):
        return jax.lax.all_gather(weight, self.embed, axis=1, tiled=True) if self.embed else weight

    def scatter(self, gradient):
        """Adds up a gradient of `gather`'s result over all rows of tokens."""
        others = tuple(axis for axis in self.batch if axis not in self.embed)
        if self.embed:
            gradient = jax.lax.psum_scatter(gradient, self.embed, scatter_dimension=1, tiled=True)
        return jax.lax.psum(gradient, others) if others else gradient


class _Chunks(NamedTuple):
    """The local vocabulary in `count` chunks of `size` rows; the last one reaches back into its neighbour."""

    count: int
    size: int
    rows: int

    @classmethod
    def of(cls, rows: int) -> "_Chunks":
        count = math.ceil(rows / _VOCAB)
        return cls(count, math.ceil(rows / count), rows)

    def start(self, chunk):
        return jnp.minimum(chunk * self.size, self.rows - self.size)

    def counts(self, chunk, first, allowed):
        """bool [size]: the rows that no chunk before has and that are allowed."""
        row = self.start(chunk) + jnp.arange(self.size)
        return (row >= chunk * self.size) & (first + row < allowed)


def _by_tokens(x, trailing: int):
    """[..., *trailing axes] -> [chunks, tokens, *trailing axes], padded with zeros."""
    x = x.reshape(-1, *x.shape[x.ndim - trailing :])
    count = math.ceil(len(x) / _TOKENS)
    size = math.ceil(len(x) / count)
    x = jnp.pad(x, [(0, count * size - len(x))] + [(0, 0)] * trailing)
    return x.reshape(count, size, *x.shape[1:])


def _by_rows(x, like):
    """Undoes `_by_tokens`."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: math.prod(like)].reshape(*like, *x.shape[1:])


def _first(cut: _Cut, rows: int):
    """Of this device's vocabulary."""
    return jax.lax.axis_index(cut.vocab) * rows if cut.vocab else 0


def _logits(h, weight, scale, counts):
    logits = jnp.einsum("td,vd->tv", h, weight, preferred_element_type=jnp.float32) * scale
    return jnp.where(counts, logits, _NEVER)


def _local_forward(cut, hidden, head, targets, scale, allowed):
    chunks, first = _Chunks.of(head.shape[0]), _first(cut, head.shape[0])
    tokens, wanted = _by_tokens(hidden, 1), _by_tokens(targets, 0)

    def over_vocabulary(stats, chunk):
        start = chunks.start(chunk)
        weight = jax.lax.dynamic_slice_in_dim(head, start, chunks.size).astype(hidden.dtype)
        weight, counts = cut.gather(weight), chunks.counts(chunk, first, allowed)

        def over_tokens(args):
            h, target, (top, total, mean, chosen) = args
            logits = _logits(h, weight, scale, counts)
            higher = jnp.maximum(top, logits.max(-1))
            away = logits - higher[:, None]
            share = jnp.exp(away)
            # `mean` is the sum of e^(l - top) (l - top): of small numbers, so that little cancels.
            kept = jnp.exp(top - higher)
            mean = kept * (mean + total * (top - higher)) + (share * away).sum(-1)
            total = kept * total + share.sum(-1)
            place = target - first - start
            here = (place >= 0) & (place < chunks.size)
            value = jnp.take_along_axis(logits, jnp.clip(place, 0, chunks.size - 1)[:, None], axis=-1)[:, 0]
            return higher, total, mean, jnp.where(here, jnp.maximum(chosen, value), chosen)

        return jax.lax.map(over_tokens, (tokens, wanted, stats)), None

    zero = jnp.zeros(wanted.shape, jnp.float32)
    start = (zero + _NEVER, zero, zero, zero + _NEVER)
    (top, total, mean, chosen), _ = jax.lax.scan(over_vocabulary, start, jnp.arange(chunks.count))
    if cut.vocab:
        highest = jax.lax.pmax(top, cut.vocab)
        kept = jnp.exp(top - highest)
        mean = jax.lax.psum(kept * (mean + total * (top - highest)), cut.vocab)
        total = jax.lax.psum(kept * total, cut.vocab)
        chosen, top = jax.lax.pmax(chosen, cut.vocab), highest
    log_total = jnp.log(total)
    results = chosen - top - log_total, log_total - mean / total, top + log_total
    return tuple(_by_rows(x, targets.shape) for x in results)


def _local_backward(cut, hidden, head, targets, scale, allowed, total, entropy, to_logprob, to_entropy):
    chunks, first = _Chunks.of(head.shape[0]), _first(cut, head.shape[0])
    tokens = _by_tokens(hidden, 1)
    wanted, *numbers = (_by_tokens(x, 0) for x in (targets, total, entropy, to_logprob, to_entropy))

    def over_vocabulary(carry, chunk):
        to_hidden, to_head = carry
        start = chunks.start(chunk)
        weight = jax.lax.dynamic_slice_in_dim(head, start, chunks.size).astype(hidden.dtype)
        weight, counts = cut.gather(weight), chunks.counts(chunk, first, allowed)
        ids = first + start + jnp.arange(chunks.size)

        def over_tokens(to_weight, args):
            h, target, to_h, total, entropy, to_logprob, to_entropy = args
            logprobs = _logits(h, weight, scale, counts) - total[:, None]
            down = to_logprob[:, None] + to_entropy[:, None] * (logprobs + entropy[:, None])
            hit = (ids == target[:, None]) & counts
            to_logits = scale * (jnp.where(hit, to_logprob[:, None], 0.0) - jnp.exp(logprobs) * down)
            to_logits = to_logits.astype(h.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            to_weight = to_weight + product("tv,td->vd", to_logits, h)
            return to_weight, to_h + product("tv,vd->td", to_logits, weight)

        to_weight, to_hidden = jax.lax.scan(
            over_tokens, jnp.zeros(weight.shape, jnp.float32), (tokens, wanted, to_hidden, *numbers)
        )
        to_weight = cut.scatter(to_weight)
        already = jax.lax.dynamic_slice_in_dim(to_head, start, chunks.size)
        to_head = jax.lax.dynamic_update_slice_in_dim(to_head, already + to_weight, start, 0)
        return (to_hidden, to_head), None

    zeros = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    (to_hidden, to_head), _ = jax.lax.scan(over_vocabulary, zeros, jnp.arange(chunks.count))
    if cut.vocab:
        to_hidden = jax.lax.psum(to_hidden, cut.vocab)
    to_hidden = _by_rows(to_hidden, targets.shape)
    return to_hidden.astype(hidden.dtype), to_head.astype(head.dtype)
