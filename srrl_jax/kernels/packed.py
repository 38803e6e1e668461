"""Rows one behind another: how prompts, and all that their branches are given, are prefilled.

A row is one sequence of tokens, its prefix and then what each of its branches is given; a branch sees the
prefix and itself. Rows of any lengths lie one behind another in sequences of a fixed size, so that one
program serves them all and little is padded (as in sequence packing and in serving without padding).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srrl_jax.kernels import gpu_prefill
from srrl_jax.kernels.attention import NEVER, attend_part, merge_parts, within_window
from srrl_jax.parallel import mesh_axes, platform

_BLOCKS = {"cpu": 64, "gpu": gpu_prefill.QUERIES, "tpu": 512}  # smaller ones were no faster on a CPU


class Pack(NamedTuple):
    """Rows one behind another in G sequences of T places.

    A token sees the places of two ranges: from `begins` to before `ends`, and from `starts` to itself. For a
    token of a branch the first is the prefix, and the second begins with the branch; for one of a prefix the
    first is empty (from its own place to before 0) and the second begins with the row.

    Shapes: all int32 [G, T]: `tokens`; `positions`, counted from the very first token, -1 at padding, which
    sees itself alone; `begins`, `ends`, `starts`.
    """

    tokens: jax.Array
    positions: jax.Array
    begins: jax.Array
    ends: jax.Array
    starts: jax.Array


def block_size() -> int:
    """Queries, and keys, that are met at a time; packs of a multiple of it are not padded."""
    return _BLOCKS[platform()]


def sequence(tokens: jax.Array) -> Pack:
    """A pack of one prefix, tokens int32 [T]."""
    place = jnp.arange(tokens.size, dtype=jnp.int32)[None]
    none = jnp.zeros_like(place)
    return Pack(tokens[None], place, begins=place, ends=none, starts=none)


def attend_packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    shared: tuple,
    pack: Pack,
    window: jax.Array | None = None,
    by_kernel: bool = False,
) -> jax.Array:
    """Attention of the tokens of a pack. No gradient flows.

    Args:
      q: [G, T, H, D].
      k, v: [G, T, K, D].
      shared: keys and values, each [1, L, K, D], of what all rows begin with; or ().
      window: int scalar, how many positions a token sees, itself included.
      by_kernel: with the kernel of `gpu_prefill`; else by XLA, a block of queries with a block of keys at a
        time, of which only those are met that some of the queries see.
    Returns:
      [G, T, H * D].
    """
    g, t, h, d = q.shape
    run = gpu_prefill.attend if by_kernel else partial(_attend, window=window)
    size = gpu_prefill.QUERIES if by_kernel else min(block_size(), t)
    padded = partial(_pad_places, more=-t % size)
    q, k, v = map(padded, (q, k, v))
    place = jnp.arange(t + -t % size, dtype=jnp.int32)
    pack = Pack(*map(padded, pack))
    pack = pack._replace(
        begins=jnp.where(place < t, pack.begins, place), starts=jnp.where(place < t, pack.starts, place)
    )
    if not jax.sharding.get_abstract_mesh().empty:
        rows, heads = mesh_axes("batch", g) or None, mesh_axes("kv_heads", k.shape[2]) or None
        cut, every = P(rows, None, heads), P(None, None, heads)
        run = jax.shard_map(run, in_specs=(cut, cut, cut, every, P(rows)), out_specs=cut, check_vma=False)
    return run(q, k, v, shared, pack)[:, :t].reshape(g, t, h * d)


def _pad_places(x: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])


def _attend(q, k, v, shared: tuple, pack: Pack, window) -> jax.Array:
    g, t, h, d = q.shape
    heads, size = k.shape[2], min(block_size(), t)
    q = q * jnp.asarray(d**-0.5, q.dtype)
    q = q.reshape(g, t, heads, h // heads, d).transpose(0, 2, 3, 1, 4)  # [G, K, H / K, T, D]
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    shared_k, shared_v = (x.swapaxes(1, 2) for x in shared) if shared else (None, None)

    def block(i):
        """The queries from place i * size on."""

        def here(x, axis=1, i=i):
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        queries = here(q, 3).reshape(g, heads, -1, d)
        begins, ends, starts, positions = map(here, (pack.begins, pack.ends, pack.starts, pack.positions))
        place = i * size + jnp.arange(size)

        def met(mask):  # [G, Q, S] -> [G, 1, H / K * Q, S]
            return jnp.tile(mask, (1, h // heads, 1))[:, None]

        def attend_block(j, part):
            key = j * size + jnp.arange(size)
            mask = (begins[..., None] <= key) & (key < ends[..., None])
            mask |= (starts[..., None] <= key) & (key <= place[:, None])
            if window is not None:
                mask &= within_window(positions, here(pack.positions, i=j), window)
            more = attend_part(queries, here(k, 2, j).mT, here(v, 2, j), met(mask))
            return merge_parts([part, more])

        if shared:  # which all rows meet as one
            flat = queries.swapaxes(0, 1).reshape(1, heads, -1, d)
            seen = jnp.arange(shared_k.shape[2])[None]
            mask = (
                jnp.ones((g, size, seen.size), bool)
                if window is None
                else within_window(positions, seen, window)
            )
            part = attend_part(flat, shared_k.mT, shared_v, met(mask).reshape(1, 1, -1, seen.size))
            part = [x.reshape(heads, g, -1, x.shape[-1]).swapaxes(0, 1) for x in part]
        else:
            one = jnp.zeros((*queries.shape[:3], 1), jnp.float32)
            part = [one + NEVER, one, jnp.zeros(queries.shape, jnp.float32)]
        own = starts.min() // size
        part = jax.lax.fori_loop(
            begins.min() // size, jnp.minimum(-(-ends.max() // size), own), attend_block, part
        )
        _, total, values = jax.lax.fori_loop(own, i + 1, attend_block, part)
        return (values / total).astype(q.dtype).reshape(g, heads, h // heads, size, d)

    done = jax.lax.map(block, jnp.arange(t // size))  # [blocks, G, K, H / K, size, D]
    return done.transpose(1, 0, 4, 2, 3, 5).reshape(g, t, h, d)
