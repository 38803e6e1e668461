"""Where a checkpoint lies, and a tensor in one of its files."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srrl_jax.errors import InputError

Box = tuple[slice, ...]  # a part of an array: for each axis a slice with start and stop


class Tensor(NamedTuple):
    """A tensor of a file, known by its header.

    `read(box, out)` fills `out` with the values in `box`, converted to the type of `out`; no more of
    the file is read than that takes.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[Box, np.ndarray], None]


def local_directory(source: str | Path, patterns: Sequence[str]) -> Path:
    """`source` itself when it is a directory, else a snapshot of the hub repository of that name.

    Args:
      source: a local directory or a Hugging Face hub id `owner/name`.
      patterns: names of the files to fetch from the hub.
    Raises:
      InputError: neither is there.
    """
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


def read_json(path: Path) -> dict[str, Any]:
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
