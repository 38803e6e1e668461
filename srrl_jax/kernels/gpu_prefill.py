"""Attention of packed rows on a GPU: one Pallas kernel (Triton), which meets what its queries see.

FlashAttention with the two ranges of `Pack` in place of a causal mask. cuDNN knows no such mask but as an
array of all pairs, and XLA has its host start each round of a loop.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from srrl_jax.kernels.attention import NEVER
from srrl_jax.parallel import platform

QUERIES, KEYS = 128, 64  # that a program meets at a time
_LAUNCH = dict(num_warps=8, num_stages=2)


def computes(head_dim: int, slides: bool) -> bool:
    """Whether prefill runs on a GPU and the kernel knows this attention: heads whose size is a power of two,
    and no sliding window."""
    return platform() == "gpu" and head_dim & (head_dim - 1) == 0 and head_dim >= 32 and not slides


def attend(q: jax.Array, k: jax.Array, v: jax.Array, shared: tuple, pack) -> jax.Array:
    """`attend_packed` of one device's rows and heads; interpreted on a CPU, for tests.

    Args:
      q, k, v, pack: T is a multiple of `QUERIES`.
      shared: L is a multiple of `KEYS`.
    Returns:
      [G, T, H, D].
    """
    g, t, h, _ = q.shape
    return pl.pallas_call(
        functools.partial(_attend, group=h // k.shape[2]),
        grid=(t // QUERIES, h, g),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attend_packed",
        interpret=platform() == "cpu",
        compiler_params=plgpu.CompilerParams(**_LAUNCH),
    )(q, k, v, shared, pack.begins, pack.ends, pack.starts)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Of products in a kernel: float32 means float32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def no_keys(queries: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax statistics before any key: maximum and sum [queries], weighted values [queries, size]."""
    one = jnp.zeros(queries, jnp.float32)
    return one + NEVER, one, jnp.zeros((queries, size), jnp.float32)


def add_keys(state: tuple, scores: jax.Array, mask: jax.Array | None, values: jax.Array, dtype) -> tuple:
    """The statistics with more keys, in a kernel.

    Args:
      state: see `no_keys`.
      scores: float32 [queries, keys].
      mask: bool, broadcastable to them, or all are seen.
      values: [keys, size].
      dtype: of the product with them.
    """
    top, total, sums = state
    if mask is not None:
        scores = jnp.where(mask, scores, NEVER)
    higher = jnp.maximum(top, scores.max(1))
    kept, weights = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
    more = plgpu.dot(weights.astype(dtype), values.astype(dtype), precision=precision_of(dtype))
    return higher, total * kept + weights.sum(1), sums * kept[:, None] + more


def _attend(q_ref, k_ref, v_ref, shared, begins_ref, ends_ref, starts_ref, out_ref, *, group):
    i, head, g = (pl.program_id(axis) for axis in range(3))
    kv, size = head // group, q_ref.shape[-1]
    here = pl.ds(i * QUERIES, QUERIES)
    q = q_ref[g, here, head, :] * jnp.asarray(size**-0.5, q_ref.dtype)
    begins, ends, starts = (x[g, here] for x in (begins_ref, ends_ref, starts_ref))
    place = i * QUERIES + jnp.arange(QUERIES)

    def attend_block(k_ref, v_ref, row, j, mask, state):
        keys = pl.ds(j * KEYS, KEYS)
        scores = plgpu.dot(q, k_ref[row, keys, kv, :].T, precision=precision_of(q.dtype))
        return add_keys(state, scores, mask, v_ref[row, keys, kv, :], q.dtype)

    def attend_own(j, state):
        key = (j * KEYS + jnp.arange(KEYS))[None]
        mask = (begins[:, None] <= key) & (key < ends[:, None])
        mask |= (starts[:, None] <= key) & (key <= place[:, None])
        return attend_block(k_ref, v_ref, g, j, mask, state)

    state = no_keys(QUERIES, size)
    if shared:

        def attend_shared(j, state):
            return attend_block(*shared, jnp.int32(0), j, None, state)

        blocks = jnp.int32(shared[0].shape[1] // KEYS)
        state = jax.lax.fori_loop(jnp.int32(0), blocks, attend_shared, state)
    own = starts.min() // KEYS
    prefix = jnp.minimum((ends.max() + KEYS - 1) // KEYS, own)
    state = jax.lax.fori_loop(begins.min() // KEYS, prefix, attend_own, state)
    end = jnp.int32(QUERIES // KEYS) * (i + 1)
    _, total, values = jax.lax.fori_loop(own, end, attend_own, state)
    out_ref[g, here, head, :] = (values / total[:, None]).astype(out_ref.dtype)
