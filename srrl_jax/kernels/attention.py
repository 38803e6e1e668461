"""One attention for prefixes and branches.

Keys and values come in *segments*: the prefix of a row, stored once and shared by its branches,
and what belongs to one branch alone. A softmax runs over all segments together, without copying
the shared ones per branch: the queries of a row's branches meet its prefix in one matrix product.
"""

import functools

import jax
import jax.numpy as jnp

from srrl_jax.errors import InputError
from srrl_jax.kernels.fused import KERNELS
from srrl_jax.kernels.int8 import Int8
from srrl_jax.kernels.segment import Segment
from srrl_jax.parallel import platform

BLOCK = 256  # queries whose scores exist at one time
NEVER = -1e30  # finite, so that a padded query (nothing to attend to) yields no NaN


def within_window(queries: jax.Array, keys: jax.Array, window: jax.Array) -> jax.Array:
    """bool [..., T, S], true where a key lies fewer than `window` positions behind the query.

    Args:
      queries: positions, int [..., T].
      keys: positions, int broadcastable to [..., S].
      window: int scalar.
    """
    return queries[..., :, None] - keys[..., None, :] < window


def check_kernel(name: str, dtype, slides: bool) -> None:
    """Raises InputError where the recipe's `attention` cannot run.

    Args:
      name: "auto", "xla", "splash" or "cudnn".
      dtype: of activations.
      slides: whether the config has layers of sliding attention.
    """
    here = platform()
    if name == "splash" and here != "tpu":
        raise InputError(f"attention: splash needs a TPU, and this is a {here}; use auto")
    if name == "splash" and slides:
        raise InputError("attention: splash does not compute this model's sliding attention; use auto or xla")
    if name == "cudnn" and here != "gpu":
        raise InputError(f"attention: cudnn needs a GPU, and this is a {here}; use auto")
    if name == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        raise InputError("attention: cudnn computes in 16 bits; set dtype=bfloat16, or use auto")


def choose_kernel(name: str, dtype, slides: bool, tokens: int) -> str:
    """What "auto" stands for here: "xla", "splash" or "cudnn"; `tokens` are those of a branch.

    A single token (decoding) has no scores worth saving and stays with XLA, whatever the name.
    """
    if tokens == 1:
        return "xla"
    if name != "auto":
        return name
    for kernel in ("splash", "cudnn"):
        try:
            check_kernel(kernel, dtype, slides)
        except InputError:
            continue
        return kernel
    return "xla"


def attend_causal(q: jax.Array, context: list[Segment], own: Segment, kernel: str = "xla") -> jax.Array:
    """`attend` over `context` and `own`, where query t sees no key of `own` behind t.

    XLA takes `BLOCK` queries at a time, each block with the keys up to its end: so scores take memory
    proportional to the length and not to its square, and half the work. The backward pass computes them
    again, as kernels do.
    """
    tokens = q.shape[2]
    if kernel != "xla" or tokens <= BLOCK:
        return attend(q, [*context, own], kernel)
    done = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        segments = [s if s.mask.shape[2] == 1 else s._replace(mask=s.mask[:, :, start:end]) for s in context]
        seen = Segment(own.k[..., :end, :], own.v[..., :end, :], own.mask[:, :, start:end, :end])
        queries = q[:, :, start:end]
        if done:  # one block after the other: else their scores may all exist together
            queries, done[-1] = jax.lax.optimization_barrier((queries, done[-1]))
        done.append(jax.checkpoint(attend)(queries, [*segments, seen]))
    return jnp.concatenate(done, axis=2)


def attend(q: jax.Array, segments: list[Segment], kernel: str = "xla") -> jax.Array:
    """Softmax attention of `q` [N, B, T, H, D] over all `segments` at once -> [N, B, T, H * D].

    Grouped-query heads: head h reads key/value head h // (H // K). Scores and softmax are float32.
    `kernel`: "xla" takes any segments; for "splash" and "cudnn" see `srrl_jax.kernels.fused`.
    """
    if kernel != "xla":
        return KERNELS[kernel](q, segments)
    n, b, t, h, d = q.shape
    heads = segments[0].k.shape[1]
    q = q.reshape(n, b, t, heads, h // heads, d).transpose(0, 3, 1, 4, 2, 5)  # [N, K, B, G, T, D]
    q = q * jnp.asarray(d**-0.5, q.dtype)

    scores = []
    for segment in segments:
        own = segment.k.shape[2]  # branches that a key belongs to one each; 1 = shared
        score = _product("nkbqd,nkbsd->nkbqs", q.reshape(n, heads, own, -1, d), segment.k)
        score = score.reshape(n, heads, b, h // heads, t, -1)
        scores.append(jnp.where(segment.mask[:, None, :, None], score, NEVER))

    top = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        top = jnp.maximum(top, score.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)

    total = jnp.zeros((), jnp.float32)
    out = jnp.zeros((), jnp.float32)
    for score, segment in zip(scores, segments, strict=True):
        weight = jnp.exp(score - top)
        total = total + weight.sum(-1, keepdims=True)
        folded = weight.reshape(n, heads, segment.v.shape[2], -1, weight.shape[-1])
        value = _product("nkbqs,nkbsd->nkbqd", folded.astype(segment.v.dtype), segment.v)
        out = out + value.reshape(n, heads, b, h // heads, t, d)
    out = (out / total).astype(q.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(n, b, t, h * d)


def attend_part(q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, mask: jax.Array) -> list[jax.Array]:
    """Attention over some of the keys, of which `merge_parts` makes that over all.

    Args:
      q: scaled queries [A, K, Q, D].
      k, v: [A, K, D, S] and [A, K, S, D], or in 8 bits.
      mask: bool, broadcastable to [A, K, Q, S].
    Returns:
      The largest score, the sum of the weights and of the weighted values, float32 [A, K, Q, 1, 1 and D].
    """
    # A scale is of a whole key or value, so it can be applied to the scores and the weights instead.
    one = jnp.ones((1, 1), jnp.float32)
    k, k_scale = k if isinstance(k, Int8) else (k, one)
    v, v_scale = v if isinstance(v, Int8) else (v, one)
    scores = jnp.einsum("akqd,akds->akqs", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * k_scale, NEVER)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    weighted = (weights * v_scale.mT).astype(q.dtype)
    values = jnp.einsum("akqs,aksd->akqd", weighted, v.astype(q.dtype), preferred_element_type=jnp.float32)
    return [top, weights.sum(-1, keepdims=True), values]


def merge_parts(parts: list[list[jax.Array]]) -> list[jax.Array]:
    """What `attend_part` would give of all keys, from what it gives of parts of them."""
    top = functools.reduce(jnp.maximum, [part[0] for part in parts])
    scales = [jnp.exp(part[0] - top) for part in parts]
    total = sum(scale * part[1] for scale, part in zip(scales, parts, strict=True))
    return [top, total, sum(scale * part[2] for scale, part in zip(scales, parts, strict=True))]


def _product(spec: str, x: jax.Array, keys: jax.Array) -> jax.Array:
    """float32 product with the keys or values of a segment; those that all rows share are not copied."""
    if keys.shape[0] < x.shape[0]:
        spec, keys = spec.replace(",n", ","), keys[0]
    return jnp.einsum(spec, x, keys, preferred_element_type=jnp.float32)
