"""Objects that a recipe names by their import path."""

import importlib
import os
import sys
from typing import Any

from srrl_jax.errors import InputError, told


def import_object(path: str, key: str) -> Any:
    """What `path` names, "package.module:name"; modules of the working directory are found too.

    Raises:
      InputError: names `key`, the path and why it cannot be imported.
    """
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    except Exception as error:  # whatever a module does when it is imported
        known = isinstance(error, ImportError | AttributeError | ValueError)
        raise InputError(
            f"{key}: cannot import {path}: {error if known else told(error)}; give package.module:name of "
            "what is installed or lies in the working directory"
        ) from None
