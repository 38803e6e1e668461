"""The one error that a user can mend."""

import dataclasses
import math
from typing import Any


class InputError(ValueError):
    """Bad input from outside: a config, data, checkpoint, mesh or grader setting.

    The message names the file, line or key and how to mend it. The command line prints it
    without a traceback and exits with code 2.
    """


def check_finite(value: Any, key: str = "") -> None:
    """Refuses numbers that are infinite or NaN in a dataclass, and in all that it holds.

    Raises:
      InputError: names the first, by `key` and the keys below it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}: must be a finite number, not {value}")
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, part in value.items():
            check_finite(part, f"{key}.{name}" if key else str(name))
