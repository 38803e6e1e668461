"""The modules that the network is made of: norms, linear maps and the MLP.

Weights are stacked on leading axes `stack`: () alone, (layers,), or (layers, experts).
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Scale(nnx.Module):
    """RMSNorm over the last axis; statistics in float32."""

    def __init__(self, stack: tuple[int, ...], size: int, axis: str | None, eps: float):
        self.weight = _parameter(jnp.ones, stack, (size,), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * y.astype(x.dtype)


class Linear(nnx.Module):
    """x [..., in] -> [..., out] with a weight [out, in] as `transformers` keeps it."""

    def __init__(
        self,
        stack: tuple[int, ...],
        sizes: tuple[int, int],
        axes: tuple[str | None, str],
        bias: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        def normal(shape):
            return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)

        self.weight = _parameter(normal, stack, sizes, axes)
        self.bias = _parameter(jnp.zeros, stack, sizes[:1], axes[:1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _parameter(init, stack, sizes, axes) -> nnx.Param:
    return nnx.Param(init((*stack, *sizes)), axes=("layers", "experts")[: len(stack)] + tuple(axes))


class MLP(nnx.Module):
    def __init__(self, hidden: int, intermediate: int, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        up, down = (intermediate, hidden), (hidden, intermediate)
        self.gate_proj = Linear(stack, up, ("mlp", "embed"), rngs=rngs)
        self.up_proj = Linear(stack, up, ("mlp", "embed"), rngs=rngs)
        self.down_proj = Linear(stack, down, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
