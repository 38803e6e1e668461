"""The one error that a user can mend."""

import dataclasses
import traceback
from typing import Any

_LARGEST = 3.4e38  # of float32, about


class InputError(ValueError):
    """Bad input from outside: a config, data, checkpoint, mesh or grader setting.

    The message names the file, line or key and how to mend it. The command line prints it
    without a traceback and exits with code 2.
    """


def told(error: Exception) -> str:
    """What somebody's own code raised, and where: "KeyError: 'a' (/home/me/mine.py:3)"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({last.filename}:{last.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def check_finite(value: Any, key: str = "") -> None:
    """Refuses numbers that are NaN, or infinite in float32, in a dataclass and in all that it holds.

    Raises:
      InputError: names the first, by `key` and the keys below it.
    """
    if isinstance(value, float) and not abs(value) < _LARGEST:
        raise InputError(f"{key}: must be a finite number, not {value}")
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, part in value.items():
            check_finite(part, f"{key}.{name}" if key else str(name))
