"""One mesh for everything, and the tables from logical axes to mesh axes: of training and of rollouts."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError

# Weights: fsdp cuts the embedding axis, tensor cuts heads, the MLP and the vocabulary, expert cuts the
# experts. Activations: rows go over data, fsdp and expert. Over expert too, because all but the experts
# would else be computed expert times over; rows meet their experts as `expert_rows`.
Rules = dict[str | None, str | tuple[str, ...] | None]
RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "batch": ("data", "fsdp", "expert"),
    "expert_rows": ("data", "fsdp"),
    None: None,
}
# While tokens are sampled each device holds whole what fsdp cuts: a step of decoding is too short to
# gather weights in it.
ROLLOUT_RULES: Rules = RULES | {"embed": None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: whatever the devices leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(f"mesh: sizes must be positive, at most one of them -1, not {sizes}")


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """The mesh (data, fsdp, tensor, expert) over `devices` (all by default).

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise InputError(
            f"mesh: {sizes} asks for a multiple of {fixed} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(np.asarray(devices).reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def shardings(variables: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """NamedShardings for a tree of NNX variables by their `axes` metadata and one of the tables.

    An axis of a weight whose size the mesh axis does not divide stays whole, except that of experts.

    Raises:
      InputError: the mesh axis `expert` does not divide the number of experts.
    """

    def one(path, variable):
        spec = []
        for size, axis in zip(variable.shape, variable.get_metadata()["axes"], strict=True):
            name = rules[axis]
            if axis == "experts" and size % mesh.shape[name]:
                divisors = [n for n in range(1, size + 1) if size % n == 0]
                raise InputError(
                    f"mesh.expert ({mesh.shape[name]}) must divide the {size} experts of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')} {variable.shape}; "
                    f"use one of {', '.join(map(str, divisors))}"
                )
            spec.append(name if name and size % mesh.shape[name] == 0 else None)
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map_with_path(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def rollout_layout(variables: Any, mesh: Mesh) -> Any:
    """Within jit: pins a tree of NNX variables to `ROLLOUT_RULES`."""

    def pin(variable, sharding):
        return variable.replace(jax.lax.with_sharding_constraint(variable[...], sharding))

    places = shardings(variables, mesh, ROLLOUT_RULES)
    return jax.tree.map(pin, variables, places, is_leaf=lambda x: isinstance(x, nnx.Variable))


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """Axes of the current mesh that cut a logical axis of this size; none without a mesh.

    An axis that they do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty or RULES[axis] is None else tuple(np.atleast_1d(RULES[axis]).tolist())
    return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of `x` by logical axes under the current mesh; nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = [mesh_axes(axis, size) or None for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*names))


def row_shards(mesh: Mesh) -> int:
    """Pieces that the rows of a batch are cut into; a number of rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh, row_axis: int = 0) -> NamedSharding:
    """Of arrays of a batch: their `row_axis` is cut over data, fsdp and expert."""
    return NamedSharding(mesh, P(*[None] * row_axis, RULES["batch"]))


def place_batch(arrays: Any, mesh: Mesh, row_axis: int = 0) -> Any:
    """Puts host arrays on the mesh, by `batch_sharding`.

    Every process has the whole arrays and transfers the rows of its own devices.
    """
    return _place(arrays, batch_sharding(mesh, row_axis))


def replicate(arrays: Any, mesh: Mesh) -> Any:
    """Puts host arrays whole on every device of the mesh."""
    return _place(arrays, NamedSharding(mesh, P()))


def in_memory(kind: str, arrays: Any) -> Any:
    """The same layout in "device" or "pinned_host" memory; what is there already is not copied."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), arrays)


def _place(arrays: Any, sharding: NamedSharding) -> Any:
    # Not device_put: over several processes it first compares the whole arrays of all of them.
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)
