"""Numbers in 8 bits, for decoding, whose time goes into reading weights and caches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """`values` * `scale`: int8, and float32 of size 1 along the axis whose numbers share a scale."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize(x: jax.Array, axis: int) -> Int8:
    """Rounds to 255 levels between minus and plus the largest magnitude along `axis`.

    Off by at most half a level: that magnitude / 254.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis, keepdims=True) / 127
    return Int8(jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)
