"""Fused attention over the tree layout: splash on TPU, cuDNN on GPU.

All segments of a row become one list of keys, and all tokens of its branches
one list of queries; which query may see which key is then a mask with many empty blocks. The kernel's online
softmax merges the prefix part and the branch part by their log-sum-exp as it walks over the blocks, so
nothing is merged outside of it, and its own gradient holds. (The public kernels can return a log-sum-exp,
but no gradient flows through it.) The price is one copy of a row's keys and values, not one for each branch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from srrl_jax.kernels.segment import Segment
from srrl_jax.parallel import mesh_axes

_LANES = 128  # splash: lengths are multiples of it


def over_mesh(function, q: jax.Array, segments: list[Segment]) -> jax.Array:
    """Runs `function(q, segments)` on each device's rows and key/value heads; at once without a mesh."""
    n, heads = q.shape[0], segments[0].k.shape[1]
    segments = [s._replace(k=_each(s.k, n), v=_each(s.v, n)) for s in segments]
    if jax.sharding.get_abstract_mesh().empty:
        return function(q, segments)
    rows, cut = P(mesh_axes("batch", n) or None), mesh_axes("kv_heads", heads) or None
    keys = P(*rows, cut)
    segments = [
        s._replace(mask=jnp.broadcast_to(s.mask, (n, *s.mask.shape[1:])), positions=None) for s in segments
    ]
    specs = [Segment(keys, keys, rows, None) for _ in segments]
    queries = P(*rows, None, None, cut)  # [N, B, T, H, D]: a device has the query heads of its key heads
    run = jax.shard_map(
        function, in_specs=(queries, specs), out_specs=P(*rows, None, None, cut), check_vma=False
    )
    return run(q, segments)


def splash(q: jax.Array, segments: list[Segment], interpret: bool = False) -> jax.Array:
    """`attend` by TPU splash attention, forward and backward; blocks that no query sees are skipped.

    The last segment must be the queries' own tokens, seen causally, with a mask [N, B, 1, T] of those that
    are not padding; the other masks must be alike for all queries of a branch (no sliding window).
    `interpret` runs it on a CPU.
    """
    n, b, t, h, d = q.shape
    *context, own = segments
    heads = own.k.shape[1]
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(n, b * t, heads, h // heads, d).transpose(0, 2, 3, 1, 4)
    real = own.mask[:, :, 0]
    seen = [jnp.broadcast_to(s.mask[:, :, 0], (n, s.k.shape[2], s.k.shape[3])) for s in context]
    keys_real = jnp.concatenate([x.reshape(n, -1) for x in (*seen, real)], axis=1)
    k, v = _flat(segments)

    mask = TreeMask(b, t, [s.k.shape[2:4] for s in context])
    queries, keys = mask.shape
    ids = splash_attention.SegmentIds(_pad(real.reshape(n, -1), 1, queries), _pad(keys_real, 1, keys))
    kernel = splash_attention.make_splash_mqa(
        splash_attention.MultiHeadMask([mask] * (h // heads)),
        block_sizes=_blocks(queries, keys),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    over_heads = jax.vmap(kernel, (0, 0, 0, None))
    ids = jax.tree.map(lambda x: x.astype(jnp.int32), ids)
    out = jax.vmap(over_heads)(_pad(q, 3, queries), _pad(k, 2, keys), _pad(v, 2, keys), ids)
    return out[:, :, :, : b * t].transpose(0, 3, 1, 2, 4).reshape(n, b, t, h * d)


def cudnn(q: jax.Array, segments: list[Segment], implementation: str = "cudnn") -> jax.Array:
    """`attend` by cuDNN, forward and backward; bfloat16 or float16.

    The last segment is the queries' own tokens, seen causally; its mask may be [N, B, 1, T], of those
    that are not padding on the right. Alone it is met by its lengths; with others by a mask, an array
    [N, B T, keys].

    `implementation` "xla" computes the same call without a GPU.
    """
    n, b, t, h, d = q.shape
    own = segments[-1]
    if len(segments) == 1 and own.mask.shape[2] == 1:
        k, v = (x.transpose(0, 2, 3, 1, 4).reshape(n * b, t, -1, d) for x in (own.k, own.v))
        lengths = jnp.maximum(jnp.broadcast_to(own.mask, (n, b, 1, t)).reshape(n * b, t).sum(1), 1)
        # Beyond the lengths nothing is written, neither results nor gradients: what lies there may be no
        # number.
        written = (jnp.arange(t) < lengths[:, None])[..., None, None]
        q, k, v = (jnp.where(written, x, 0) for x in (q.reshape(n * b, t, h, d), k, v))
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
        return jnp.where(written, out, 0).reshape(n, b, t, h * d)
    masks = []
    for s in segments:
        branches, size = s.k.shape[2:4]
        mask = jnp.broadcast_to(_causal(s.mask) if s is own else s.mask, (n, b, t, size))[:, :, :, None]
        if branches > 1:  # [N, B, T, branches, S]
            mask = mask & jnp.eye(branches, dtype=bool)[None, :, None, :, None]
        masks.append(mask.reshape(n, b * t, branches * size))
    k, v = (x.transpose(0, 2, 1, 3) for x in _flat(segments))
    out = jax.nn.dot_product_attention(
        q.reshape(n, b * t, h, d),
        k,
        v,
        mask=jnp.concatenate(masks, -1)[:, None],
        implementation=implementation,
    )
    return out.reshape(n, b, t, h * d)


def _causal(mask: jax.Array) -> jax.Array:
    """[N, B, T, T] of a mask [N, B, 1, T]; another stays."""
    if mask.shape[2] > 1 or mask.shape[3] == 1:
        return mask
    return mask & jnp.tril(jnp.ones((mask.shape[3],) * 2, bool))


def _flat(segments: list[Segment]) -> tuple[jax.Array, jax.Array]:
    """All keys and all values, each [N, K, keys, D]."""

    def join(arrays):
        return jnp.concatenate([x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in arrays], axis=2)

    return join([s.k for s in segments]), join([s.v for s in segments])


def _each(x: jax.Array, rows: int) -> jax.Array:
    """What all rows share, a copy for each: the kernels want a row's keys in one piece."""
    return jnp.broadcast_to(x, (rows, *x.shape[1:]))


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


class TreeMask(splash_attention.Mask):
    """What the tokens of branches see, padding apart; computed a block at a time, for it can be huge.

    Args:
      branches, tokens: B and T of the queries, which are also the last keys.
      context: (B or 1, S) of each earlier segment.
    """

    def __init__(self, branches: int, tokens: int, context: list[tuple[int, int]]):
        query = np.stack(np.divmod(np.arange(branches * tokens), tokens))  # branch and step
        key = [
            np.stack([np.repeat(np.arange(own) if own > 1 else -1, size), np.full(own * size, -1)])
            for own, size in context
        ]  # -1: seen by all branches, at all steps
        key = np.concatenate([*key, query], axis=1)
        # Filled up to whole lanes: with queries like the last, as no row may be empty, and unseen keys.
        self.query = np.pad(query, [(0, 0), (0, -query.shape[1] % _LANES)], mode="edge")
        self.key = np.pad(key, [(0, 0), (0, -key.shape[1] % _LANES)], constant_values=tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return self.query.shape[1], self.key.shape[1]

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        branch, step = self.query[:, block[0], None]
        key_branch, key_step = self.key[:, None, block[1]]
        return ((key_branch == -1) | (key_branch == branch)) & (key_step <= step)


def _blocks(queries: int, keys: int) -> splash_attention.BlockSizes:
    """The largest blocks up to 512 that divide both lengths."""
    q, kv = (next(size for size in (512, 384, 256, 128) if n % size == 0) for n in (queries, keys))
    return splash_attention.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip


KERNELS = {
    "splash": functools.partial(over_mesh, splash),
    "cudnn": functools.partial(over_mesh, cudnn),
}
