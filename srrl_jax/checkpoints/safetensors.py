"""Safetensors files, read by byte range and written a tensor at a time.

The format (https://github.com/huggingface/safetensors, "Format"): the length of the header in 8 bytes,
the header as JSON, the tensors. The library itself copies a slice several times on its way, keeps the
pages of a whole file resident, and writes only from tensors that are all in memory.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from srrl_jax.checkpoints.files import Box, Tensor, read_rows
from srrl_jax.errors import InputError

_DTYPES = {name: jnp.dtype(kind) for name, kind in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}.items()}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 2**26  # bytes of the file that are mapped, or fetched, at one time


def read(file: Path | epath.Path) -> dict[str, Tensor]:
    """The tensors of a file by name; only the header is read.

    Raises:
      InputError: no such file, not a safetensors file, or a tensor that is truncated, overlaps another
        or has a type that is not a float of 16 to 64 bits (names tensor and file).
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(start - 8, size)))
        header.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        for name, entry in header.items():
            begin, end = spans[name]
            if begin < 0 or any(dimension < 0 for dimension in entry["shape"]):
                raise ValueError(f"negative numbers in tensor {name!r}")
    except FileNotFoundError:
        raise InputError(f"{file}: this shard of the checkpoint is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # how broken JSON shows
        raise InputError(f"{file}: truncated or not a safetensors file ({error}); fetch it again") from None

    last, last_name = 0, None
    for name in sorted(spans, key=lambda name: tuple(spans[name])):
        if spans[name][0] < last:
            raise InputError(f"{file}: corrupt: tensor {name!r} overlaps {last_name!r}; fetch it again")
        last, last_name = spans[name][1], name
    return {name: _tensor(file, name, entry, start, size) for name, entry in header.items()}


def _tensor(file: Path | epath.Path, name: str, entry: dict[str, Any], start: int, size: int) -> Tensor:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in _DTYPES:
        raise InputError(
            f"{file}: tensor {name!r} is {kind}; use an unquantized checkpoint ({', '.join(_DTYPES)})"
        )
    dtype = _DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"{file}: corrupt: tensor {name!r} has {end - begin} bytes for {kind} {shape}; fetch it again"
        )
    if start + end > size:
        raise InputError(
            f"{file}: truncated in tensor {name!r}, which ends at byte {start + end} of "
            f"{size}; fetch it again"
        )

    def read(box: Box, out: np.ndarray) -> None:
        # The pages of a map stay resident until it is closed, so a large tensor is mapped in chunks.
        rows = max(1, _CHUNK // (math.prod(shape[1:]) * dtype.itemsize))
        first, *rest = box
        for row in range(first.start, first.stop, rows):
            chunk = slice(row, min(row + rows, first.stop))
            values = read_rows(file, dtype, start + begin, shape, chunk)[:, *rest]
            out[chunk.start - first.start : chunk.stop - first.start] = values

    return Tensor(file, shape, read)


def write(
    file: Path | epath.Path, shapes: dict[str, tuple[int, ...]], dtype: Any, tensors: Iterable[np.ndarray]
) -> None:
    """Writes `tensors`, one at a time, under the names and shapes of `shapes`, all of `dtype`."""
    dtype, header, end = jnp.dtype(dtype), {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are to start at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8).data)
