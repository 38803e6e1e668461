"""Where a checkpoint lies, on a disk or in an object store, and a tensor in one of its files."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError

Box = tuple[slice, ...]  # a part of an array: for each axis a slice with start and stop


class Tensor(NamedTuple):
    """A tensor of a file, known by its header.

    `read(box, out)` fills `out` with the values in `box`, converted to the type of `out`; no more of
    the file is read than that takes.
    """

    file: epath.PathLike
    shape: tuple[int, ...]
    read: Callable[[Box, np.ndarray], None]


def checkpoint_directory(source: epath.PathLike, patterns: Sequence[str]) -> Path | epath.Path:
    """`source` itself when it is a directory, else a snapshot of the hub repository of that name.

    Args:
      source: a directory, here or in an object store (gs://), or a Hugging Face hub id `owner/name`.
      patterns: names of the files to fetch from the hub.
    Raises:
      InputError: neither is there.
    """
    if storage.is_remote(source):
        path = storage.locate(source)
        if not path.is_dir():
            raise InputError(f"{source}: no such directory")
        return path
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source}: is a file; give the checkpoint's directory")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise InputError(f"{source}: no such directory (a hub id looks like 'Qwen/Qwen3-0.6B')")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # what huggingface_hub's errors derive from
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: no such directory here, and the Hugging Face hub did not give it: {reason}"
        ) from error


@contextmanager
def on_disk(directory: Path | epath.Path, patterns: Sequence[str]) -> Iterator[Path]:
    """The directory itself, or of one in an object store a copy of what matches, for as long as this lasts.

    An InputError from inside names the directory, not the copy.
    """
    if not storage.is_remote(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in {file for pattern in patterns for file in directory.glob(pattern)}:
            with file.open("rb") as there, (Path(copy) / file.name).open("wb") as here:
                shutil.copyfileobj(there, here)
        try:
            yield Path(copy)
        except InputError as error:
            raise InputError(str(error).replace(copy, str(directory))) from error


def read_rows(
    file: epath.PathLike, dtype: np.dtype, offset: int, shape: tuple[int, ...], rows: slice
) -> np.ndarray:
    """`rows` of an array that lies at byte `offset` of a file: a map of a disk, a range read of a store."""
    if not storage.is_remote(file):
        return np.memmap(file, dtype, "r", offset, shape)[rows]
    size = math.prod(shape[1:]) * dtype.itemsize
    with epath.Path(file).open("rb") as stream:
        stream.seek(offset + rows.start * size)
        data = stream.read((rows.stop - rows.start) * size)
    return np.frombuffer(data, dtype).reshape(-1, *shape[1:])


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """The object in the JSON file `path`; {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return content
