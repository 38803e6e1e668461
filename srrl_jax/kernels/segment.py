"""What attention reads, in pieces."""

from typing import NamedTuple

import jax


class Segment(NamedTuple):
    """Keys and values that queries attend to.

    Shapes: `k`, `v` [N or 1, K, B or 1, S, D], where size 1 means shared by all rows or by the row's
    branches, in one layer; a stack of all layers has a leading axis [layers, ...]. `mask` is bool,
    broadcastable to [N, B, T, S], true where a query may look. `positions` of the keys, int broadcastable
    to [N, B, S] (any value at padding), is read by layers with sliding attention only.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    positions: jax.Array | None = None
