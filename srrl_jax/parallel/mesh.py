"""One mesh for everything, and the tables from logical axes to mesh axes: of training and of rollouts."""

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError

# Weights: fsdp cuts the embedding axis, tensor cuts heads, the MLP and the vocabulary, expert cuts the
# experts. Activations: rows go over all axes but tensor. Over expert too, because all but the experts
# would else be computed expert times over; rows meet their experts as `expert_rows`. Between layers tensor
# cuts the tokens of a row (see `models/qwen3.py`). Nothing but rows goes over slice, since the network
# between slices is slow: sampled tokens cross it, and gradients, once a microbatch.
Rules = dict[str | None, str | tuple[str, ...] | None]
RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "tokens": "tensor",
    "experts": "expert",
    "batch": ("slice", "data", "fsdp", "expert"),
    "expert_rows": ("slice", "data", "fsdp"),
    None: None,
}
# While tokens are sampled each device holds whole what fsdp cuts: a step of decoding is too short to
# gather weights in it.
ROLLOUT_RULES: Rules = RULES | {"embed": None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, outermost first; one of them may be -1: whatever the devices leave.

    `slice` counts the parts of the machine whose devices have a fast network among themselves: the slices
    of a multi-slice TPU; of GPUs nodes, or equal groups of nodes.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(f"mesh: sizes must be positive, at most one of them -1, not {sizes}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "data=2,tensor=4"; what is not named stays as it is by default.

        Raises:
          InputError: an unknown axis, or no whole number.
        """
        axes = [field.name for field in dataclasses.fields(cls)]
        sizes = {}
        for part in filter(None, text.split(",")):
            axis, _, size = map(str.strip, part.partition("="))
            if axis not in axes or not size.removeprefix("-").isdecimal():
                raise InputError(f"mesh: {part!r}: give AXIS=SIZE, where AXIS is {listed(axes)}")
            sizes[axis] = int(size)
        return cls(**sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """The mesh (slice, data, fsdp, tensor, expert) over `devices` (all by default).

    Raises:
      InputError: the sizes do not multiply to the number of devices, or `slice` is not how the devices
        lie.
    """
    if devices is None:
        devices = jax.devices()
        if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
            look_for_gpu()
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise InputError(
            f"mesh: {sizes} asks for a multiple of {fixed} devices, but there are {len(devices)}; "
            "set one axis to -1 to take what is left, the others to a product of "
            f"{listed(divisors(len(devices)))}"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(_by_slice(devices, shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


@cache
def look_for_gpu() -> None:
    """Warns, once, where there is one that JAX does not use."""
    if os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi"):
        logging.getLogger(__name__).warning(
            "this machine has an NVIDIA GPU, but JAX does not use it: pip install 'srrl-jax[cuda13]', or "
            "'srrl-jax[cuda12]' for drivers older than 580"
        )


@contextmanager
def computing(mesh: Mesh, dtype: str, matmul_precision: str = "highest") -> Iterator[None]:
    """Sets the mesh, and how products of float32 are computed where `dtype` is float32.

    By themselves GPUs round their factors to TF32 and TPUs to bfloat16; with "highest" they are products of
    float32, as on CPUs. "default" leaves it to JAX.
    """
    wanted = dtype == "float32" and matmul_precision != "default"
    before = jax.config.jax_default_matmul_precision
    # Not jax.default_matmul_precision, which is of one thread: others may compile.
    jax.config.update("jax_default_matmul_precision", matmul_precision if wanted else before)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def _by_slice(devices, shape: list[int]) -> np.ndarray:
    """`devices` in `shape`, whose first axis is that of slices.

    Raises:
      InputError: so many slices do not fit the devices.
    """
    count, *within = shape
    if devices[0].platform == "tpu":
        there = len({getattr(device, "slice_index", 0) for device in devices})
        if count != there:
            raise InputError(f"mesh.slice ({count}) must be the number of the TPU's slices, which is {there}")
        if count > 1:
            return mesh_utils.create_hybrid_device_mesh(
                [1, *within], [count] + [1] * len(within), devices, allow_split_physical_axes=True
            )
    # JAX lists devices process by process. Its helper asks for one slice a node of GPUs or a process, where
    # a slice may well be several of them, or on a CPU a part of one.
    processes = len({device.process_index for device in devices})
    if max(count, processes) % min(count, processes):
        raise InputError(
            f"mesh.slice ({count}) would cut the devices of one of the {processes} processes apart; use "
            f"{listed(divisors(processes))}, or a multiple of {processes}"
        )
    return np.asarray(devices).reshape(shape)


def divisors(size: int, most: int | None = None) -> list[int]:
    """All of them, ascending, up to `most`."""
    return [n for n in range(1, (most or size) + 1) if size % n == 0]


def listed(items: list) -> str:
    """For a message: "1, 2 or 4"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} or {last}" if first else last


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
                raise InputError(
                    f"mesh.expert ({mesh.shape[name]}) must divide the {size} experts of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')} {variable.shape}; "
                    f"use {listed(divisors(size))}"
                )
            spec.append(name if name and size % mesh.shape[name] == 0 else None)
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map_with_path(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def rollout_layout(variables: Any, mesh: Mesh) -> Any:
    """Within jit: pins a tree of NNX variables to `ROLLOUT_RULES`."""
    return _pinned(variables, shardings(variables, mesh, ROLLOUT_RULES))


def train_layout(variables: Any) -> Any:
    """Within jit: pins a tree of NNX variables to `RULES` under the current mesh; nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return variables if mesh.empty else _pinned(variables, shardings(variables, mesh))


def _pinned(variables: Any, places: Any) -> Any:
    def pin(variable, sharding):
        return variable.replace(jax.lax.with_sharding_constraint(variable[...], sharding))

    return jax.tree.map(pin, variables, places, is_leaf=lambda x: isinstance(x, nnx.Variable))


def platform() -> str:
    """Where programs are compiled for: "cpu", "gpu" or "tpu", of the current mesh if there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """Axes of the current mesh that cut a logical axis of this size; none without a mesh.

    An axis that they do not divide stays whole, and one that they cut into a single piece: libtpu 0.0.42, at
    low effort, aborts on a reduce-scatter of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty or RULES[axis] is None else tuple(np.atleast_1d(RULES[axis]).tolist())
    pieces = math.prod(mesh.shape[name] for name in names)
    return names if pieces > 1 and size % pieces == 0 else ()


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
    """Of arrays of a batch: their `row_axis` is cut over all axes but tensor."""
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
