"""Examples from a JSONL file, a parquet file, a TFDS or `datasets` directory, or the Hub."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from srrl_jax import storage
from srrl_jax.data.tfds import read_tfds
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example

_HUB_ID = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<split>[\w]+))?")
_FILE = re.compile(r"\.(jsonl?|parquet|csv|txt|ya?ml|zip|gz)$")


class Row(NamedTuple):
    """A row as it stands in its source, not yet checked.

    Attributes:
      where: file and line, or source and row, for messages.
      value: what was read; None beside a fault.
      fault: why it could not be read, with the mend, or "".
    """

    where: str
    value: Any
    fault: str = ""


def load_examples(source: str | Path) -> list[Example]:
    """Read every row of a source, in order.

    `source` is a `.jsonl` file in HealthBench's schema, a `.parquet` file, a directory that
    `srrl_jax.data.write_tfds` or `datasets.save_to_disk` wrote, or a Hub id `owner/name` with an
    optional `:split` (default train). Files and `datasets` directories may lie on gs:// or s3://.

    Raises InputError that names the file and line (or the row) and the mend: a source that does
    not exist, invalid JSON, a row that `Example.from_dict` refuses, a repeated `prompt_id`, no rows.
    """
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for where, row, fault in read_rows(source):
        if fault:
            raise InputError(f"{where}: {fault}")
        try:
            example = Example.from_dict(row)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        if example.prompt_id in seen:
            raise InputError(
                f"{where}: prompt_id {example.prompt_id!r} is already used at "
                f"{seen[example.prompt_id]}: remove one of the rows, or give each its own prompt_id"
            )
        seen[example.prompt_id] = where
        examples.append(example)
    if not examples:
        raise InputError(f"{source} holds no rows: add at least one")
    return examples


def read_rows(source: str | Path) -> Iterator[Row]:
    """Every row of a source (see `load_examples`) in order, unchecked.

    Raises InputError for a source that cannot be read at all.
    """
    source = str(source)
    path = storage.locate(source) if storage.is_remote(source) else epath.Path(source)
    hub_id = _HUB_ID.fullmatch(source)
    if path.is_file() and path.suffix == ".jsonl":
        return _jsonl(path)
    if path.is_file() and path.suffix == ".parquet":
        return _by_datasets(source, lambda datasets: datasets.Dataset.from_parquet(source))
    if path.is_file():
        raise InputError(f"{source} is neither .jsonl nor .parquet: convert it to one of them")
    if (path / "features.json").is_file():
        if storage.is_remote(path):
            raise InputError(
                f"{source}: array_record files are read from a disk; mount the bucket, or copy them"
            )
        return _numbered(source, read_tfds(path))
    if (path / "state.json").is_file():
        return _by_datasets(source, lambda datasets: datasets.load_from_disk(source))
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        choice = " or ".join(str(path / split) for split in splits)
        raise InputError(f"{source} holds several splits: give one of them, {choice}")
    if path.is_dir():
        raise InputError(
            f"{source} is a directory, but neither srrl_jax.data.write_tfds nor "
            "datasets.save_to_disk wrote it: give a .jsonl or .parquet file in it"
        )
    if hub_id and not _FILE.search(source):
        name, split = hub_id["name"], hub_id["split"] or "train"
        return _by_datasets(source, lambda datasets: datasets.load_dataset(name, split=split))
    raise InputError(f"{source}: no such file or directory; check the path of the rows")


def _jsonl(path: epath.Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                yield Row(where, None, f"not valid JSON ({error}); write one object a line, in UTF-8")
                continue
            if text:
                yield Row(where, row)


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"{source} row {index}", row) for index, row in enumerate(rows))


def _by_datasets(source: str, read: Callable[[Any], Iterable[Any]]) -> Iterator[Row]:
    import datasets  # slow to import

    try:
        rows = read(datasets)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"`datasets` cannot read {source} ({error}): check the path, or the Hub id "
            "owner/name:split and the network"
        ) from error
    return _numbered(source, rows)
