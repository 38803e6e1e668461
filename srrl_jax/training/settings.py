"""From YAML files and key=value overrides to the values of a dataclass."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.starting import recipes

_PACKAGE = "package:"
_BY_ROWS = "shapes follow from the rows; leave it out"
# Keys that recipes once had, and what took their place.
_RETIRED = {
    "rollout.prompt_buckets": f"{_BY_ROWS}, or limit prompts by rollout.max_prompt_tokens and data.too_long",
    "rollout.completion_buckets": f"{_BY_ROWS}; the limit is rollout.max_new_tokens",
    "rollout.rows": f"{_BY_ROWS}, or limit what runs at a time by rollout.memory_gb",
    "grading.prefix_buckets": _BY_ROWS,
    "grading.criterion_buckets": _BY_ROWS,
    "grading.criteria_buckets": _BY_ROWS,
    "grading.rows": f"{_BY_ROWS}, or limit what runs at a time by grading.memory_gb",
}


def read_settings(kind: type, path: Path | epath.Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a YAML file and of those it inherits, with `key.sub=value` overrides, whose values are
    YAML too; not yet of checked types.

    Args:
      kind: the dataclass whose keys they may have, with a dataclass for each section.
    Raises:
      InputError: names the file or override, the key, and for an unknown key the nearest known.
    """
    values = _read(path)
    _check_keys(kind, values, where=str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r}: an override has the form key=value")
        nested: dict[str, Any] = {}
        try:
            _put(nested, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{override!r}: the value is not valid YAML: {problem}") from None
        _check_keys(kind, nested, where=override)
        values = merged(values, nested)
    return _in_package(values)


def find_recipe(path: str | Path) -> epath.Path:
    """A file, or a recipe of the package by its name.

    Raises:
      InputError: there is neither.
    """
    known = recipes()
    if str(path) in known and not epath.Path(path).exists():
        return epath.Path(known[str(path)])
    if not epath.Path(path).exists():
        raise InputError(f"{path}: no such config file, nor a recipe of the package ({', '.join(known)})")
    return epath.Path(path)


def _in_package(value: Any) -> Any:
    """Nested values, in which "package:FILE" is the path of a file of this package."""
    if isinstance(value, dict):
        return {key: _in_package(each) for key, each in value.items()}
    if isinstance(value, str) and value.startswith(_PACKAGE):
        path = Path(__file__).parents[1] / value.removeprefix(_PACKAGE)
        if not path.exists():
            raise InputError(f"{value}: the package has no such file; give a path without {_PACKAGE}")
        return str(path)
    return value


def _read(path: Path | epath.Path, heirs: tuple[Path | epath.Path, ...] = ()) -> dict[str, Any]:
    """A YAML recipe over those that it inherits."""
    if path.resolve() in heirs:
        raise InputError(f"{path}: inherits: leads back to the recipe itself")
    values = storage.read_yaml(path)
    values.pop("identity", None)  # what config.yaml of a run has beside the recipe
    parent = values.pop("inherits", None)
    if parent is None:
        return values
    parent = path.parent / _in_package(str(parent))  # an absolute path stays as it is
    return merged(_read(parent, (*heirs, path.resolve())), values)


def _put(target: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        target = target.setdefault(name, {})
    target[path[-1]] = value


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """The values of both, nested ones too; where both have a key, those of `top`."""
    found = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        found[key] = merged(base[key], value) if both else value
    return found


def _check_keys(kind: Any, values: dict[str, Any], where: str, path: str = "") -> None:
    """Refuses keys that the dataclass `kind` does not have, and names the nearest that it has."""
    fields = {field.name: _section(field.type) for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if f"{path}{key}" in _RETIRED:
            raise InputError(f"{where}: {path}{key}: is no key any more; {_RETIRED[f'{path}{key}']}")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {path + near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise InputError(f"{where}: unknown key {path + str(key)!r}; {hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            _check_keys(fields[key], value, where, f"{path}{key}.")
        elif isinstance(value, bool) and not _is_switch(fields[key]):  # pydantic would read 1 or 0
            raise InputError(f"{where}: {path}{key}: not a switch, so it cannot be {str(value).lower()}")


def _is_switch(kind: Any) -> bool:
    return kind is bool or any(map(_is_switch, get_args(kind)))


def _section(kind: Any) -> Any:
    """The dataclass of a section that may be left out; any other type as it is."""
    return next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), kind)
