"""LoRA: small trainable matrices beside frozen weights (arXiv 2106.09685)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models.qwen3 import Qwen3


class Adapter(nnx.Module):
    """x [..., in] -> [..., out], the part alpha / rank * x down.T up.T that is added to a projection.

    `down` [layers, rank, in] and `up` [layers, out, rank] are `nnx.LoRAParam`s, and here shapes alone.
    """

    def __init__(self, weight: nnx.Param, rank: int, alpha: float):
        layers, outputs, inputs = weight.shape
        stack, out_axis, in_axis = weight.get_metadata()["axes"]

        def parameter(shape, axes):
            return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

        self.down = parameter((layers, rank, inputs), (stack, None, in_axis))
        self.up = parameter((layers, outputs, rank), (stack, out_axis, None))
        self.scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jnp.einsum("...i,ri->...r", x, self.down[...].astype(x.dtype))
        return self.scale * jnp.einsum("...r,or->...o", inner, self.up[...].astype(x.dtype))


def add_adapters(model: Qwen3, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Gives the named projections of all layers an adapter, of shapes without values.

    Raises:
      InputError: a target that no layer has (those of experts take none).
    """
    stacks = [stack for stack in (model.layers, model.moe_layers) if stack is not None]
    for target in targets:
        found = [p[target] for p in (stack.projections() for stack in stacks) if target in p]
        if not found:
            raise InputError(f"lora.targets: no layer has a {target} that takes an adapter (experts do not)")
        for linear in found:
            linear.adapter = Adapter(linear.weight, rank, alpha)


def first_adapters(shapes: Any, key: jax.Array) -> Any:
    """Values for adapters of the given shapes: together they add nothing, as `up` is zero.

    `down` is uniform within 1 / sqrt(in), as in the `peft` library.
    """

    def one(path, variable):
        if path[-1] == "up":
            return variable.replace(jnp.zeros(variable.shape, variable.dtype))
        own = jax.random.fold_in(key, place[path])
        bound = variable.shape[-1] ** -0.5
        return variable.replace(jax.random.uniform(own, variable.shape, variable.dtype, -bound, bound))

    flat = nnx.to_flat_state(shapes)
    place = {path: i for i, (path, _) in enumerate(flat)}
    return nnx.from_flat_state([(path, one(path, variable)) for path, variable in flat])


def merge_adapters(model: Qwen3) -> None:
    """Adds adapters to the weights beside them, in place, and takes them away."""
    for stack in (model.layers, model.moe_layers):
        for linear in stack.projections().values() if stack is not None else ():
            if linear.adapter is not None:
                a = linear.adapter
                change = a.scale * jnp.einsum("lor,lri->loi", a.up[...], a.down[...])
                linear.weight[...] = linear.weight[...] + change.astype(linear.weight.dtype)
                linear.adapter = None
