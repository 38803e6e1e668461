"""The modules that the network is made of: norms, linear maps and the MLP.

Weights are stacked on leading axes `stack`: () alone, (layers,), or (layers, experts).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.kernels.int8 import quantize

# XLA:CPU multiplies up to about this many rows a third faster as weight @ x.T than as x @ weight.T, and
# would turn one into the other but for a barrier. Elsewhere so few rows wait for the weights anyway.
_FEW = 64


def project(x: jax.Array, weight: jax.Array, out_type=None) -> jax.Array:
    """x [..., in] times weight [out, in], in the type of x -> [..., out] (in `out_type`)."""
    weight = weight.astype(x.dtype)
    if x.size // x.shape[-1] > _FEW:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=out_type)
    flat = x.reshape(-1, x.shape[-1])
    y = jnp.einsum("oi,ri->or", weight, flat, preferred_element_type=out_type)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


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
    """x [..., in] -> [..., out] with a weight [out, in] as `transformers` keeps it.

    After `quantize` the weight is int8, with a float32 `scale` [out]. What an `adapter` (see
    `srrl_jax.models.lora`) makes of x is added.
    """

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
        self.scale, self.adapter = nnx.data(None), nnx.data(None)

    def quantize(self) -> None:
        axes, (values, scale) = self.weight.get_metadata()["axes"], quantize(self.weight[...], axis=-1)
        self.weight = nnx.Param(values, axes=axes)
        self.scale = nnx.Param(scale[..., 0], axes=axes[:-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.weight[...], jnp.float32 if self.scale is not None else None)
        if self.scale is not None:
            y = (y * self.scale[...]).astype(x.dtype)
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def join(linears: Sequence[Linear], groups: int) -> Linear:
    """One map in place of several that have the same input and no adapters: a product of them all.

    Its outputs lie in `groups`: in each, that share of the first map's outputs, then of the second's.
    """
    whole = nnx.merge(*nnx.split(linears[-1]))  # keeps its axes

    def joined(variables):
        parts = [v[...].reshape(groups, -1, *v.shape[1:]) for v in variables]
        value = jnp.concatenate(parts, axis=1)
        return variables[-1].replace(value.reshape(-1, *value.shape[2:]))

    whole.weight = joined([linear.weight for linear in linears])
    if whole.bias is not None:
        whole.bias = joined([linear.bias for linear in linears])
    return whole


def _parameter(init, stack, sizes, axes) -> nnx.Param:
    return nnx.Param(init((*stack, *sizes)), axes=("layers", "experts")[: len(stack)] + tuple(axes))


class MLP(nnx.Module):
    """Gated by SiLU. After `join`, `gate_proj` computes both the gate and what it gates."""

    def __init__(self, hidden: int, intermediate: int, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        up, down = (intermediate, hidden), (hidden, intermediate)
        self.gate_proj = Linear(stack, up, ("mlp", "embed"), rngs=rngs)
        self.up_proj = Linear(stack, up, ("mlp", "embed"), rngs=rngs)
        self.down_proj = Linear(stack, down, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate_proj(x)
        if self.up_proj is None:
            pairs = gate.reshape(*gate.shape[:-1], -1, 2)
            gate, up = pairs[..., 0], pairs[..., 1]
        else:
            up = self.up_proj(x)
        return self.down_proj(jax.nn.silu(gate) * up)

    def join(self) -> None:
        if self.gate_proj.adapter is None and self.up_proj.adapter is None:
            self.gate_proj = join([self.gate_proj, self.up_proj], self.gate_proj.weight.shape[0])
            self.up_proj = nnx.data(None)
