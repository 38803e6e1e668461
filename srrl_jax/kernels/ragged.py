"""Products of rows with the matrix of their group, whose gradients take no more work than they do."""

import jax
import jax.numpy as jnp

_TILE = 512  # rows: wide enough that a tile's product outweighs reading and writing one matrix


@jax.custom_vjp
def ragged_product(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Each row times the matrix of its group.

    Args:
      rows: [M, in], sorted by group; those beyond the last group give anything.
      matrices: [groups, out, in], of the same type.
      sizes: int32 [groups], rows of each group.
    Returns:
      [M, out].
    """
    return _product(rows, matrices, sizes, contracting=2)


def _product(rows, matrices, sizes, contracting):
    axes = jax.lax.RaggedDotDimensionNumbers((((1,), (contracting,)), ((), ())), [0], [0])
    return jax.lax.ragged_dot_general(rows, matrices, sizes, axes)


def _forward(rows, matrices, sizes):
    return ragged_product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept, gradient):
    rows, matrices, sizes = kept
    to_matrices = outer_products(gradient, rows, sizes).astype(matrices.dtype)
    return _product(gradient, matrices, sizes, contracting=1), to_matrices, None


ragged_product.defvjp(_forward, _backward)


def outer_products(left: jax.Array, right: jax.Array, sizes: jax.Array) -> jax.Array:
    """left^T right of each group's rows: [M, a] and [M, b], sorted by group -> float32 [groups, a, b].

    XLA would multiply all rows for every group, most of them by zero (on a TPU 32 times the work for 32
    groups). Here a tile of rows is multiplied once for each group that it holds rows of: M / tile + groups
    times at most. As `tgmm` of JAX's Megablox does it, but for every backend and within `shard_map`.
    """
    groups = sizes.size
    tile = min(_TILE, max(8, 1 << (len(left) // groups).bit_length()))
    left, right = (jnp.pad(x, [(0, -len(x) % tile), (0, 0)]) for x in (left, right))
    visits = len(left) // tile + groups
    ends = jnp.cumsum(sizes)
    first = (ends - sizes) // tile  # tile of each group
    counts = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    visited, numbers = jnp.cumsum(counts), jnp.arange(visits)
    group_of = jnp.minimum(jnp.searchsorted(visited, numbers, side="right"), groups - 1)
    starts = (first[group_of] + numbers - visited[group_of] + counts[group_of]) * tile

    def visit(sums, which):
        group, start = which
        place = start + jnp.arange(tile)  # beyond the last group in the visits that are left over
        mine = (place >= ends[group] - sizes[group]) & (place < ends[group])
        parts = (jax.lax.dynamic_slice_in_dim(x, start, tile) for x in (left, right))
        a, b = (jnp.where(mine[:, None], part, 0) for part in parts)  # both: there may be NaN beyond
        product = jnp.einsum("ra,rb->ab", a, b, preferred_element_type=jnp.float32)
        return sums.at[group].add(product), None

    sums = jnp.zeros((groups, left.shape[1], right.shape[1]), jnp.float32)
    # Under `shard_map` a loop's state has to vary over the axes that what it adds varies over.
    varies = jnp.where(False, left[0, 0] * right[0, 0] * sizes[0], 0).astype(jnp.float32)
    return jax.lax.scan(visit, sums + varies, (group_of, starts))[0]
