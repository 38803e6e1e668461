"""Attention of a decoded token on a GPU: two Pallas kernels (Triton) a layer, where XLA makes twenty.

The first meets each prefix once with the queries of all its branches. The second goes on from there over a
branch's own tokens in the ring, and puts the new token's key and value into it. Both norm and rotate what
they are given, read of the caches only what is there, and write no scores (FlashDecoding; branches that
share a prefix are what FlashInfer calls a cascade). JAX's own `decode_attention` reads no ring, leaves parts
to be merged, and is deprecated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec as P

from srrl_jax.kernels import gpu_prefill
from srrl_jax.kernels.gpu_prefill import KEYS  # that a program meets at a time; divides the size of a cache
from srrl_jax.parallel import mesh_axes, platform

_ROWS = 16, 64  # fewest and most queries of a product
_PROGRAMS = 264  # two for each multiprocessor of an H100: with fewer, prefixes are split,
_SPLITS = 8  # into so many parts at most
_LAUNCH = dict(num_warps=4, num_stages=2)


class NewToken(NamedTuple):
    """Of S slots, as projected: `heads` [S, K, G + 2, D], the queries of each key, the key and the value;
    weights of the norms [D], or None."""

    heads: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None


class SlotTable(NamedTuple):
    """What a token's attention reads and where, alike in all layers; see `PrefixCache` and `BranchCache`.

    Shapes: `cos`, `sin` float32 [S, D / 2]; `prefix_lengths` int32 [N]; `first`, `ends` int32 [N, B]; `slots`
    int32 [R, N / R * B]; `cells` int32 [R, S / R]; `lengths` int32 [S], of what lies before `column` int32
    [1], the new token's.
    """

    cos: jax.Array
    sin: jax.Array
    prefix_lengths: jax.Array
    first: jax.Array
    ends: jax.Array
    slots: jax.Array
    cells: jax.Array
    lengths: jax.Array
    column: jax.Array


def computes(head_dim: int, slides: bool, group: int) -> bool:
    """Whether decoding runs on a GPU, and the kernels know this attention: that of `gpu_prefill`, with a
    power of two of queries for each key, `group`."""
    return gpu_prefill.computes(head_dim, slides) and group & (group - 1) == 0


def attend(new: NewToken, own, prefix, shared, places: SlotTable, *, eps: float):
    """Attention of one new token of each slot over what all prefixes begin with, its prefix and its own.

    On a CPU the kernels are interpreted, for tests.

    Args:
      own: keys [S, K, D, T] and values [S, K, T, D] of the slots; prefix: [N, K, D, P] and [N, K, P, D];
        shared: [1, K, D, L] and [1, K, L, D], or (). T, P and L are multiples of `KEYS`.
      eps: of the norms.
    Returns:
      [S, K, G, D] in the type of `heads`, and `own` with the new token.
    """
    run = functools.partial(_attend, eps=eps)
    if jax.sharding.get_abstract_mesh().empty:
        return run(new, own, prefix, shared, places)
    slots, heads = new.heads.shape[:2]
    rows, heads = mesh_axes("batch", slots) or None, mesh_axes("kv_heads", heads) or None
    cut, row = P(rows, heads), P(rows)
    run = jax.shard_map(
        run,
        in_specs=(
            NewToken(cut, P(), P()),
            cut,
            cut,
            P(None, heads),
            SlotTable(*[row] * 8, P()),
        ),
        out_specs=(cut, cut),
        check_vma=False,
    )
    return run(new, own, prefix, shared, places)


def _attend(new: NewToken, own, prefix, shared, places: SlotTable, eps: float):
    (s, heads, g, d), (n, _, size, _) = new.heads.shape, prefix[1].shape
    fan_out, g = places.slots.size // n, g - 2
    rows = min(max(_ROWS[0], pl.next_power_of_2(fan_out * g)), _ROWS[1])
    tiles = pl.cdiv(fan_out * g, rows)
    splits = max(1, min(_SPLITS, _PROGRAMS // (n * heads * tiles), size // (2 * KEYS)))
    sizes = dict(g=g, fan_out=fan_out, eps=eps)
    options = dict(interpret=platform() == "cpu", compiler_params=plgpu.CompilerParams(**_LAUNCH))

    part = jax.ShapeDtypeStruct((n, heads, splits, tiles * rows), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(_attend_prefix, rows=rows, splits=splits, **sizes),
        grid=(tiles * splits, heads, n),
        out_shape=(part, part, jax.ShapeDtypeStruct((*part.shape, d), jnp.float32)),
        name="attend_prefix",
        **options,
    )(new, places._replace(slots=places.slots.reshape(-1)), prefix, shared)
    cells = places.cells.reshape(-1)
    return pl.pallas_call(
        functools.partial(_attend_own, **sizes),
        grid=(heads, s),
        out_shape=(
            jax.ShapeDtypeStruct((s, heads, g, d), new.heads.dtype),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own),
        ),
        input_output_aliases={0: 1, 1: 2},
        name="attend_own",
        **options,
    )(own, new, places._replace(cells=cells), parts)


def _rotated(x_ref: Any, norm_ref: Any, at: tuple, cos, sin, eps: float) -> tuple:
    """Heads or a head of `x_ref`, normed and rotated as `Attention` does: both halves [..., D / 2]."""
    half = x_ref.shape[-1] // 2
    cos, sin = (x.astype(x_ref.dtype) for x in (cos, sin))
    first, second = parts = [x_ref[(*at, pl.ds(i * half, half))] for i in (0, 1)]
    if norm_ref is not None:
        first, second = (x.astype(jnp.float32) for x in parts)
        mean = ((first * first).sum(-1) + (second * second).sum(-1)) / (2 * half)
        scale = jax.lax.rsqrt(mean + eps)
        scale = scale[:, None] if first.ndim == 2 else scale
        first, second = ((x * scale).astype(x_ref.dtype) for x in (first, second))
        first *= norm_ref[pl.ds(0, half)].astype(x_ref.dtype)
        second *= norm_ref[pl.ds(half, half)].astype(x_ref.dtype)
    return first * cos - second * sin, second * cos + first * sin


def _queries(new: NewToken, places: SlotTable, slots, head, group, eps: float) -> list:
    """Scaled, both halves [len(slots), D / 2]."""
    half = new.heads.shape[-1] // 2
    cos, sin = (x[slots, pl.ds(0, half)] for x in (places.cos, places.sin))
    scale = jnp.asarray((2 * half) ** -0.5, new.heads.dtype)
    return [x * scale for x in _rotated(new.heads, new.q_norm, (slots, head, group), cos, sin, eps)]


def _attend_block(q, k_ref, v_ref, of: tuple, start, mask, state: tuple) -> tuple:
    """Softmax statistics (maximum, sum, weighted values) with `KEYS` more keys: those from `start` on of the
    sequence and head `of`, where `mask` bool [queries or 1, KEYS], if any. What it hides is read all the
    same: a masked load would be one of single numbers."""
    half, columns, dtype = q[0].shape[1], pl.ds(start, KEYS), q[0].dtype
    scores = jnp.zeros((q[0].shape[0], KEYS), jnp.float32)
    for i, part in enumerate(q):
        keys = k_ref[(*of, pl.ds(i * half, half), columns)]
        scores += plgpu.dot(part, keys.astype(dtype), precision=gpu_prefill.precision_of(dtype))
    return gpu_prefill.add_keys(state, scores, mask, v_ref[(*of, columns, slice(None))], dtype)


def _attend_prefix(new, places, prefix, shared, *parts, rows, splits, g, fan_out, eps):
    """A part of a prefix, and before the first what all prefixes begin with, with a tile of its branches'
    queries."""
    tile, split = pl.program_id(0) // splits, pl.program_id(0) % splits
    head, n = pl.program_id(1), pl.program_id(2)
    row = tile * rows + jnp.arange(rows)
    branch = jnp.minimum(row // g, fan_out - 1)
    slots = places.slots[n * fan_out + branch]
    used = slots.max() >= 0  # a row may have fewer branches than the tiles are for
    q = _queries(new, places, jnp.maximum(slots, 0), head, row % g, eps)
    state = gpu_prefill.no_keys(rows, new.heads.shape[-1])
    place = jnp.arange(KEYS)
    if shared:

        def attend_shared(i, state):
            return _attend_block(q, *shared, (jnp.int32(0), head), i * KEYS, None, state)

        size = jnp.int32(shared[1].shape[2] // KEYS)
        blocks = jnp.where(used & (split == 0), size, jnp.int32(0))
        state = jax.lax.fori_loop(jnp.int32(0), blocks, attend_shared, state)
    length, first, ends = places.prefix_lengths[n], places.first[n, branch], places.ends[n, branch]
    blocks = jnp.where(used, (jnp.maximum(length, ends.max()) + KEYS - 1) // KEYS, 0)
    each = (blocks + splits - 1) // splits

    def attend_block(i, state):
        key = (i * KEYS + place)[None]
        mask = (key < length) | ((first[:, None] <= key) & (key < ends[:, None]))
        return _attend_block(q, *prefix, (n, head), i * KEYS, mask, state)

    state = jax.lax.fori_loop(split * each, jnp.minimum(blocks, split * each + each), attend_block, state)
    here = pl.ds(tile * rows, rows)
    for ref, x in zip(parts, state, strict=True):
        ref[(n, head, split, here) + (slice(None),) * (x.ndim - 1)] = x


def _attend_own(own, new, places, parts, out_ref, own_ref, *, g, fan_out, eps):
    """A slot's own tokens, after what was found of its prefix; then the new token itself."""
    head, slot = pl.program_id(0), pl.program_id(1)
    (tops, totals, sums), size, half = parts, own[1].shape[2], new.heads.shape[-1] // 2
    row = jnp.arange(max(g, _ROWS[0]))  # beyond g the same again, as products want so many
    q = _queries(new, places, slot + 0 * row, head, row % g, eps)

    n, at = places.cells[slot] // fan_out, places.cells[slot] % fan_out * g + row % g
    top, splits = tops[n, head, 0, at], tops.shape[2]
    for split in range(1, splits):
        top = jnp.maximum(top, tops[n, head, split, at])
    total, values = jnp.zeros_like(top), jnp.zeros((row.size, 2 * half), jnp.float32)
    for split in range(splits):
        kept = jnp.exp(tops[n, head, split, at] - top)
        total += kept * totals[n, head, split, at]
        values += kept[:, None] * sums[n, head, split, at, :]

    column, length, place = places.column[0], places.lengths[slot], jnp.arange(KEYS)
    oldest = (column - length + size) % size
    blocks = jnp.minimum((oldest % KEYS + length + KEYS - 1) // KEYS, size // KEYS)

    def attend_block(i, state):
        start = (oldest // KEYS + i) % (size // KEYS) * KEYS
        age = (column - start - place + size) % size
        return _attend_block(q, *own, (slot, head), start, ((age > 0) & (age <= length))[None], state)

    top, total, values = jax.lax.fori_loop(0, blocks, attend_block, (top, total, values))

    cos, sin = (x[slot, pl.ds(0, half)] for x in (places.cos, places.sin))
    keys = _rotated(new.heads, new.k_norm, (slot, head, g), cos, sin, eps)
    value = new.heads[slot, head, g + 1, :]
    score = jnp.zeros_like(top)
    for i, (part, key) in enumerate(zip(q, keys, strict=True)):
        key = key.astype(own_ref[0].dtype)
        own_ref[0][slot, head, pl.ds(i * half, half), column] = key
        score += (part.astype(jnp.float32) * key[None].astype(jnp.float32)).sum(1)
    own_ref[1][slot, head, column, :] = value.astype(own_ref[1].dtype)
    higher = jnp.maximum(top, score)
    kept, weight = jnp.exp(top - higher), jnp.exp(score - higher)
    values = values * kept[:, None] + weight[:, None] * value[None].astype(jnp.float32)
    out = values / (total * kept + weight)[:, None]
    out_ref[slot, head, row % g, :] = out.astype(out_ref.dtype)
