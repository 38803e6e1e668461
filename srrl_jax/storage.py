"""Files on this machine and in object stores (gs://, s3://) by one interface, and logs that grow.

Paths are `etils.epath.Path`, which serve both.

An object store cannot append. There, a log is a row of objects, one for each append (`metrics-000001.jsonl`,
...), each written whole or not at all; on a disk it is one file (`metrics.jsonl`). `parts` finds either.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

import fsspec
import yaml
from etils import epath

from srrl_jax.errors import InputError

_STORES = ("gs", "s3")


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` lies in an object store."""
    return "://" in os.fspath(path)


def locate(path: epath.PathLike) -> epath.Path:
    """`path` from the root of its disk or store on.

    Raises:
      InputError: a URL that is not of an object store, or the library of that store is missing.
    """
    if not is_remote(path):
        return epath.Path(path).resolve()
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _STORES:
        raise InputError(
            f"{path} is a URL: give a path on this machine, or {' or '.join(_STORES)}://BUCKET/..."
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # its text names what to install
        raise InputError(f"{path}: {error}") from None
    return epath.Path(path)


def read_yaml(path: epath.PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
      InputError: it is not there, cannot be read, or is no mapping; one line with file, line and mend.
    """
    path = epath.Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{line}: not valid YAML ({what}); mend it there") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: must be a mapping of keys to values; write it as `key: value` lines")
    return values


def parts(log: epath.PathLike) -> list[epath.Path]:
    """The files that hold a log, in order; none before its first line."""
    log = epath.Path(log)
    if not log.parent.is_dir():
        return []
    numbered = re.compile(rf"{re.escape(log.stem)}-\d{{6}}{re.escape(log.suffix)}")
    found = sorted((path for path in log.parent.iterdir() if numbered.fullmatch(path.name)), key=str)
    return [*found, log] if log.is_file() else found


def append(log: epath.PathLike, data: bytes) -> None:
    """Adds `data` to the end of a log; on return the system or the store has it."""
    log = epath.Path(log)
    if not is_remote(log):
        with log.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not outlive the lines of its step
    elif data:
        last = parts(log)
        number = int(last[-1].stem[-6:]) + 1 if last else 1
        log.with_name(f"{log.stem}-{number:06d}{log.suffix}").write_bytes(data)


def replace(path: epath.PathLike, pieces: Iterable[bytes]) -> None:
    """Writes a file anew, all of it or nothing: who is killed here leaves the old one."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(b"".join(pieces))
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
