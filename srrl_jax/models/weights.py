"""Checkpoints: Hugging Face safetensors and GGUF in, safetensors out.

Nothing is allocated and no values are read before every name and shape is known to fit.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from srrl_jax.errors import InputError
from srrl_jax.models import gguf
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.files import Tensor, local_directory, read_json
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.parallel import shardings

_FLOATS = ("F64", "F32", "F16", "BF16")


def load(source: str | Path, *, mesh=None, dtype=jnp.float32) -> Qwen3:
    """Loads a checkpoint.

    Args:
      source: a directory or a hub id `owner/name` that holds `config.json` with
        `model.safetensors` (or shards and their index), or one GGUF file (`config.json` optional).
      mesh: places each weight by the table of `srrl_jax.parallel`; default device without it.
      dtype: of the stored weights and of the computation.
    Raises:
      InputError: no weights, pickled weights, an unreadable file, a config that this network does
        not compute, or tensors that are missing, unexpected or misshapen (names tensor and file).
    """
    directory = local_directory(source, ("*.json", "*.safetensors", "*.model", "*.jinja"))
    config, tensors = _open(directory)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=dtype)))
    variables = dict(nnx.to_flat_state(state))
    names = {path: _names(path, config) for path in variables}
    _check(directory, tensors, variables, names)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors)

    def value(path, variable) -> jax.Array:
        host = np.empty(variable.shape, jnp.dtype(dtype))
        for row, name in zip(_rows(path, host), names[path], strict=True):
            row[...] = tensors[name].read()
        if mesh is None:
            return jnp.asarray(host)
        # Every process reads the file; each puts only its own shards on its devices.
        return jax.make_array_from_callback(host.shape, shardings(variable, mesh), host.__getitem__)

    loaded = [(path, v.replace(value(path, v))) for path, v in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save(model: Qwen3, directory: str | Path, dtype=jnp.float32) -> None:
    """Writes `config.json` and `model.safetensors` with weights in `dtype`, for `transformers`.

    With several processes all must call it; the first one writes.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = variable[...]
        if not array.is_fully_addressable:
            array = process_allgather(array, tiled=True)
        host = np.asarray(array).astype(jnp.dtype(dtype), order="C")
        tensors.update(zip(_names(path, model.config), _rows(path, host), strict=True))
    if jax.process_index() == 0:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {**model.config.to_hf(), "dtype": jnp.dtype(dtype).name}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _names(path: tuple[str, ...], config: Qwen3Config) -> list[str]:
    """Checkpoint tensors that make up the parameter `path`: one, or one per layer."""
    if path[0] == "layers":
        rest = ".".join(path[1:])
        return [f"model.layers.{i}.{rest}" for i in range(config.num_hidden_layers)]
    name = ".".join(path)
    return [name if path[0] == "lm_head" else f"model.{name}"]


def _rows(path: tuple[str, ...], array: np.ndarray) -> list[np.ndarray]:
    """Views of `array`, one for each of `_names`."""
    return list(array) if path[0] == "layers" else [array]


def _open(directory: Path) -> tuple[Qwen3Config, dict[str, Tensor]]:
    """The config and the tensors by checkpoint name; only headers are read."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        files = [directory / "model.safetensors"]
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: field 'weight_map' is missing")
        files = [directory / name for name in sorted(set(shards.values()))]
    else:
        return _open_gguf(directory)

    config = Qwen3Config.from_hf(directory)
    tensors = {}
    for file in files:
        for name, tensor in _open_safetensors(file).items():
            if name in tensors:
                raise InputError(f"{file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return config, tensors


def _open_gguf(directory: Path) -> tuple[Qwen3Config, dict[str, Tensor]]:
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
    return tensor._replace(read=lambda: tensor.read().astype(dtype))


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        handle = safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{file}: this shard of the checkpoint is missing") from None
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error}); fetch it again") from None
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (not a dict)
        header = handle.get_slice(name)
        if header.get_dtype() not in _FLOATS:
            raise InputError(
                f"{file}: tensor {name!r} is {header.get_dtype()}; use an unquantized checkpoint "
                f"({', '.join(_FLOATS)})"
            )

        def read(name=name):
            return handle.get_tensor(name)

        tensors[name] = Tensor(file, tuple(header.get_shape()), read)
    return tensors


def _check(directory, tensors, variables, names) -> None:
    shapes = {
        name: variable.shape[1:] if path[0] == "layers" else variable.shape
        for path, variable in variables.items()
        for name in names[path]
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
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise InputError(
            f"{head.file}: tensor 'lm_head.weight' differs from the embedding, but config.json ties "
            "them; set tie_word_embeddings to false"
        )


def _some(names) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
