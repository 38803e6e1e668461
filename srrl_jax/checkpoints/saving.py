"""Saving a model as a directory that `transformers` loads, with one tensor at a time on the host."""

import json
import math
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from srrl_jax import storage
from srrl_jax.checkpoints import safetensors
from srrl_jax.checkpoints.files import checkpoint_directory, read_json
from srrl_jax.checkpoints.names import tensor_names
from srrl_jax.checkpoints.tokenizer import TOKENIZER_FILES, load_tokenizer
from srrl_jax.models.qwen3 import Qwen3

_PEFT = {"down": "lora_A", "up": "lora_B"}  # what `peft` calls the two matrices of an adapter
# Fields of a config.json that the network does not read and that generation needs.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_model(
    model: Qwen3,
    directory: str | Path,
    dtype: Any = None,
    *,
    tokenizer: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors files, with an index where they are several.

    With several processes all must call it: tensors are gathered one at a time, and the first process
    writes. The bytes do not depend on the mesh.

    Args:
      model: on any mesh.
      directory: is made, here or in an object store; weights of an earlier save in it are removed.
      dtype: of the files; by default that of the weights.
      tokenizer: directory, here or in an object store, or hub id, whose tokenizer files and
        generation_config.json are copied. Where it has none of the latter, one is written that names the
        tokenizer's stop tokens.
      max_shard_size: most bytes of tensors in a file; a larger tensor has a file to itself.
    Raises:
      InputError: no tokenizer at `tokenizer`.
    """
    dtype = jnp.dtype(model.embed_tokens.weight.dtype if dtype is None else dtype)
    directory = storage.locate(directory)
    arrays = {".".join(path): v[...] for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    places = {
        name: (parameter, index)
        for parameter in arrays
        for name, index in tensor_names(tuple(parameter.split(".")), model.config).items()
    }
    shapes = {name: arrays[parameter].shape[len(index) :] for name, (parameter, index) in places.items()}
    files = split(shapes, dtype.itemsize, max_shard_size)

    first = jax.process_index() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
        for old in list(directory.iterdir()):
            if fnmatch(old.name, "model*.safetensors*"):
                old.unlink()
        _write_settings(model, directory, dtype, tokenizer)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(map(math.prod, shapes.values())) * dtype.itemsize},
                "weight_map": {name: file for file, names in files.items() for name in names},
            }
            _write_json(directory / "model.safetensors.index.json", index)
    for file, names in files.items():
        tensors = (_gather(arrays[places[name][0]], places[name][1]) for name in names)
        if first:
            safetensors.write(directory / file, {name: shapes[name] for name in names}, dtype, tensors)
        else:
            deque(tensors, maxlen=0)  # take part in gathering, keep nothing


def save_adapter(
    model: Qwen3,
    directory: str | Path,
    dtype: Any,
    *,
    base: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
) -> None:
    """Writes the adapters of a model (`add_adapters`) as the library `peft` writes LoRA.

    That is adapter_config.json and adapter_model.safetensors, in which `down` is lora_A and `up` lora_B of
    each projection. All processes must call it; the first writes.

    Args:
      directory: is made, here or in an object store.
      dtype: of the file.
      base: the directory or hub id of the weights that the adapters stand beside.
      rank, alpha, targets: with which they were added.
    """
    directory, dtype = storage.locate(directory), jnp.dtype(dtype)
    places = {
        f"base_model.model.{name.removesuffix('weight')}{_PEFT[path[-1]]}.weight": (value[...], index)
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        for name, index in tensor_names((*path[:-2], "weight"), model.config).items()
    }
    tensors = (_gather(*place) for place in places.values())
    if jax.process_index() > 0:
        deque(tensors, maxlen=0)
        return
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: array.shape[len(index) :] for name, (array, index) in places.items()}
    safetensors.write(directory / "adapter_model.safetensors", shapes, dtype, tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    _write_json(directory / "adapter_config.json", settings)


def split(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
    """The names of each file's tensors, in order; files are named as `transformers` names them."""
    groups, filled = [[]], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _gather(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    tensor = array[index]
    return np.asarray(tensor if tensor.is_fully_addressable else process_allgather(tensor, tiled=True))


def _write_settings(
    model: Qwen3, directory: epath.Path, dtype: np.dtype, tokenizer: str | Path | None
) -> None:
    config = {**model.config.to_hf(), "dtype": dtype.name}
    if tokenizer is not None:
        source = checkpoint_directory(tokenizer, TOKENIZER_FILES)
        fields = read_json(source / "config.json")
        config |= {key: fields[key] for key in _TOKEN_IDS if fields.get(key) is not None}
        for file in {file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}:
            if file.name != "config.json" and storage.locate(source) != directory:
                (directory / file.name).write_bytes(file.read_bytes())
        if not (source / "generation_config.json").exists():
            tokens = load_tokenizer(source)
            settings = {"eos_token_id": list(tokens.stop_ids), "pad_token_id": tokens.pad_id}
            _write_json(directory / "generation_config.json", settings)
    _write_json(directory / "config.json", config)


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
