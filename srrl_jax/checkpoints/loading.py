"""Loading a checkpoint, Hugging Face safetensors or GGUF, straight into the shards of a mesh.

Nothing is allocated and no values are read before every name and shape is known to fit. Then a
parameter is made at a time, and of a stack of layers one layer: beside the loaded weights the host
holds at most what its devices need of one tensor (of as many experts' as the mesh cuts them into).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePath

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.checkpoints import gguf, safetensors
from srrl_jax.checkpoints.files import Box, Tensor, checkpoint_directory, on_disk, read_json
from srrl_jax.checkpoints.names import tensor_names
from srrl_jax.errors import InputError
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.parallel import is_main, shardings, unsharded_axes


def load_model(source: str | Path, *, mesh=None, dtype=jnp.float32) -> Qwen3:
    """Loads a checkpoint; each process reads what its own devices hold.

    Args:
      source: a directory (here or gs://) or a hub id `owner/name` that holds `config.json` with
        `model.safetensors` (or shards and their index), or one GGUF file (`config.json` optional).
      mesh: places each weight by the table of `srrl_jax.parallel`; default device without it.
      dtype: of the stored weights and of the computation.
    Raises:
      InputError: no weights, pickled weights, an unreadable file, a config that this network does
        not compute, or tensors that are missing, unexpected, misshapen or hold values that are not
        finite (names tensor and file).
    """
    with _fetch(source) as directory:
        return _load(directory, mesh, dtype)


def _load(directory: Path | epath.Path, mesh, dtype) -> Qwen3:
    config, tensors = _open(directory)
    graphdef, state = nnx.split(abstract(config, dtype))
    variables = dict(nnx.to_flat_state(state))
    names = {path: tensor_names(path, config) for path in variables}
    placed = {} if mesh is None else dict(nnx.to_flat_state(shardings(state, mesh)))
    if mesh is not None and is_main():
        for note in unsharded_axes(state, config.num_key_value_heads, mesh):
            logging.getLogger(__name__).warning(note)
    _check(directory, tensors, variables, names)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors)
    broken: dict[str, Tensor] = {}
    tensors = {name: _watched(name, tensor, broken) for name, tensor in tensors.items()}
    loaded = []
    for path, variable in variables.items():
        parts = {index: tensors[name] for name, index in names[path].items()}
        loaded.append((path, variable.replace(_parameter(parts, variable.shape, placed.get(path), dtype))))
    if broken:
        files = _some(sorted({tensor.file.name for tensor in broken.values()}))
        raise InputError(
            f"{directory}: tensor {_some(broken)} ({files}) holds NaN or infinity: the file is damaged, or "
            "of a run that diverged; fetch it again or take another"
        )
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def read_config(source: str | Path) -> Qwen3Config:
    """The config of the checkpoint that `load` would load; see there for errors."""
    with _fetch(source) as directory:
        return _open(directory)[0]


def abstract(config: Qwen3Config, dtype=jnp.float32) -> Qwen3:
    """The network with shapes for weights: nothing is allocated."""
    return nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=dtype))


@contextmanager
def _fetch(source: str | Path) -> Iterator[Path | epath.Path]:
    """The checkpoint's directory; a GGUF file in an object store lies on a disk for as long as this lasts."""
    directory = checkpoint_directory(source, ("*.json", "model*.safetensors", "*.model", "*.jinja"))
    mapped = len(list(directory.glob("*.gguf"))) == 1 and not any(directory.glob("model*.safetensors"))
    with on_disk(directory, ("*.gguf", "config.json")) if mapped else nullcontext(directory) as directory:
        yield directory


def _watched(name: str, tensor: Tensor, broken: dict[str, Tensor]) -> Tensor:
    """The same, noted in `broken` where what is read is not finite."""

    def read(box: Box, out: np.ndarray) -> None:
        tensor.read(box, out)
        # A sum of squares passes over float32 once, ten times as fast; a finite one may overflow.
        summed = out.dtype == np.float32 and np.isfinite(np.vdot(out, out))
        if not (summed or np.isfinite(out).all()):
            broken[name] = tensor

    return tensor._replace(read=read)


# The tensors of a parameter by their index in it: () alone, (layer,) or (layer, expert).
Parts = dict[tuple[int, ...], Tensor]


def _parameter(parts: Parts, shape: tuple[int, ...], sharding: NamedSharding | None, dtype) -> jax.Array:
    if () in parts:
        return _place(parts, shape, sharding, dtype).block_until_ready()
    row_sharding = sharding and NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    stack = jnp.zeros(shape, dtype, device=sharding)
    for layer in range(shape[0]):
        of_layer = {index[1:]: tensor for index, tensor in parts.items() if index[0] == layer}
        for each, rows, size in _turns(of_layer, shape[1:], row_sharding):
            stack = _set_row(stack, _place(rows, size, row_sharding, dtype), layer, each)
            stack.block_until_ready()  # else rows would pile up on the host, as parameters above
    return stack


def _turns(
    rows: Parts, shape: tuple[int, ...], sharding: NamedSharding | None
) -> Iterator[tuple[int, Parts, tuple[int, ...]]]:
    """A layer at once; a layer of experts in turns, one expert of each part that the mesh cuts them into.

    Yields which expert of its part it is (0 where there are none), the tensors, and their shape together.
    """
    if () in rows:
        yield 0, rows, shape
        return
    cut = sharding.spec[0] if sharding and sharding.spec else None
    cuts = 1 if cut is None else math.prod(sharding.mesh.shape[axis] for axis in np.atleast_1d(cut).tolist())
    for each in range(shape[0] // cuts):
        of_each = {(i,): rows[i * (shape[0] // cuts) + each,] for i in range(cuts)}
        yield each, of_each, (cuts, *shape[1:])


@partial(jax.jit, donate_argnums=0)
def _set_row(stack: jax.Array, row: jax.Array, layer: int, each: int) -> jax.Array:
    # As integers: on CPU, XLA updates a bfloat16 array in place but by way of float32, all of it.
    bits = jnp.dtype(f"uint{8 * stack.dtype.itemsize}")
    stack_bits, row_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (stack, row))
    if row.shape != stack.shape[1:]:  # [layers, experts, ...] as [layers, parts, experts of a part, ...]
        stack_bits = stack_bits.reshape(stack.shape[0], row.shape[0], -1, *row.shape[1:])
        start = (layer, 0, each) + (0,) * (row.ndim - 1)
        stack_bits = jax.lax.dynamic_update_slice(stack_bits, row_bits[None, :, None], start)
        stack_bits = stack_bits.reshape(stack.shape)
    else:
        stack_bits = jax.lax.dynamic_update_index_in_dim(stack_bits, row_bits, layer, 0)
    return jax.lax.bitcast_convert_type(stack_bits, stack.dtype)


def _place(parts: Parts, shape: tuple[int, ...], sharding: NamedSharding | None, dtype) -> jax.Array:
    """An array on its devices; what this process's devices hold of it is read once."""
    if sharding is None:
        return jax.device_put(_read(parts, tuple(slice(0, size) for size in shape), dtype))
    shards = [
        tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    box = tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*shards, strict=True)
    )
    host = _read(parts, box, dtype)

    def shard(index: Box) -> np.ndarray:
        bounds = (s.indices(size) for s, size in zip(index, shape, strict=True))
        return host[
            tuple(
                slice(start - b.start, stop - b.start)
                for (start, stop, _), b in zip(bounds, box, strict=True)
            )
        ]

    return jax.make_array_from_callback(shape, sharding, shard)


def _read(parts: Parts, box: Box, dtype) -> np.ndarray:
    """The values in `box` of the array that `parts` make up."""
    out = np.empty([s.stop - s.start for s in box], jnp.dtype(dtype))
    for index, tensor in parts.items():
        place = tuple(i - s.start for i, s in zip(index, box, strict=False))
        if all(0 <= i < size for i, size in zip(place, out.shape, strict=False)):
            tensor.read(box[len(index) :], out[place])
    return out


def _open(directory: Path | epath.Path) -> tuple[Qwen3Config, dict[str, Tensor]]:
    """The config and the tensors by checkpoint name; only headers are read."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        files = [directory / "model.safetensors"]
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: field 'weight_map' is missing")
        for name, file in shards.items():
            if not isinstance(file, str) or PurePath(file).is_absolute() or ".." in PurePath(file).parts:
                raise InputError(
                    f"{index}: weight_map: tensor {name!r} lies in {file!r}, no file of this directory"
                )
        files = [directory / name for name in sorted(set(shards.values()))]
    else:
        return _open_gguf(directory)

    config = Qwen3Config.from_hf(directory)
    tensors = {}
    for file in files:
        for name, tensor in safetensors.read(file).items():
            if name in tensors:
                raise InputError(f"{file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return config, tensors


def _open_gguf(directory: Path | epath.Path) -> tuple[Qwen3Config, dict[str, Tensor]]:
    files = sorted(directory.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{directory}: several GGUF files ({_some(f.name for f in files)}); keep one")
    if not files:
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise InputError(
                f"{directory}: {_some(pickles)}: pickled weights are never loaded; convert to safetensors"
            )
        raise InputError(
            f"{directory}: no weights; put model.safetensors (or its shards and index) or one "
            ".gguf file there"
        )
    if not (directory / "config.json").exists():
        return gguf.read(files[0])
    config, tensors = gguf.read(files[0], Qwen3Config.from_hf(directory))
    fields = read_json(directory / "config.json")
    declared = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return config, {name: _rounded(tensor, jnp.dtype(declared)) for name, tensor in tensors.items()}


def _rounded(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """A tensor of a quantized file in the type that the model's config.json declares.

    transformers loads it so by default (dtype "auto"), and reference numbers come from there; the
    rounding is far finer than the quantization.
    """

    def read(box: Box, out: np.ndarray) -> None:
        values = np.empty(out.shape, dtype)
        tensor.read(box, values)
        out[...] = values

    return tensor._replace(read=read)


def _check(directory, tensors, variables, names) -> None:
    shapes = {
        name: variable.shape[len(index) :]
        for path, variable in variables.items()
        for name, index in names[path].items()
    }
    missing = [name for name in shapes if name not in tensors]
    if missing:
        files = _some(sorted({tensor.file.name for tensor in tensors.values()}))
        raise InputError(
            f"{directory}: the weights ({files}) lack tensor {_some(missing)} that the config asks for"
        )
    for name, tensor in tensors.items():
        if name in shapes:
            if tensor.shape != shapes[name]:
                raise InputError(
                    f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, but the config "
                    f"asks for {shapes[name]}"
                )
        elif not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            # inv_freq: a buffer that old versions of transformers saved; the network computes it.
            raise InputError(
                f"{tensor.file}: tensor {name!r} is not part of the network in the config; "
                "the checkpoint is of another architecture or has an adapter"
            )


def _check_tied(tensors: dict[str, Tensor]) -> None:
    """Refuses a tied config whose file has another lm_head.

    transformers (5.x, `tie_weights`) ties equal ones and, with a warning, unties unequal ones;
    here a config that contradicts its weights is an error.
    """
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape or not all(map(np.array_equal, _chunks(head), _chunks(embedding))):
        raise InputError(
            f"{head.file}: tensor 'lm_head.weight' differs from the embedding, but config.json ties "
            "them; set tie_word_embeddings to false"
        )


def _chunks(tensor: Tensor, rows: int = 1024) -> Iterator[np.ndarray]:
    """The values of a matrix, some rows at a time."""
    for start in range(0, tensor.shape[0], rows):
        yield _read(
            {(): tensor},
            (slice(start, min(start + rows, tensor.shape[0])), slice(0, tensor.shape[1])),
            np.float32,
        )


def _some(names) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
