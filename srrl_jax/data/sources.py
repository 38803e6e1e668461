"""Examples from JSON, CSV and parquet files, a TFDS or `datasets` directory, or the Hub."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from srrl_jax import storage
from srrl_jax.data.schemas import SCHEMAS, Schema, canonical_row, find_schema, in_words_of
from srrl_jax.data.tfds import read_tfds
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example, row_faults

_HUB_ID = re.compile(
    r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>[\w.]+))?"
)
_FILE = re.compile(r"\.(jsonl?|parquet|csv|txt|ya?ml|zip|gz|zst)$")
NO_FIELDS: Mapping[str, str] = MappingProxyType({})


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


def load_examples(source: str | Path, fields: Mapping[str, str] = NO_FIELDS) -> list[Example]:
    """Read every row of a source, in order.

    `source` is a `.jsonl`, `.json`, `.csv` or `.parquet` file (those of text also as `.gz` or `.zst`), a
    directory that `srrl_jax.data.write_tfds` or `datasets.save_to_disk` wrote, or a Hub id `owner/name`
    with an optional `:split` (default train) or `:config:split`. Files and `datasets` directories may lie on
    gs:// or s3://. Rows have one of `SCHEMAS`, or the names of fields that `fields` gives, see `find_schema`.

    Raises InputError that names the file and line (or the row) and the mend: a source that does
    not exist, invalid JSON, a row that cannot be read, a repeated `prompt_id`, no rows.
    """
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for row in read_rows(source):
        example, _, faults = read_example(row, fields)
        if example is None:
            raise InputError(f"{row.where}: {faults[0]}")
        if example.prompt_id in seen:
            raise InputError(
                f"{row.where}: prompt_id {example.prompt_id!r} is already used at "
                f"{seen[example.prompt_id]}: remove one of the rows, or give each its own prompt_id"
            )
        seen[example.prompt_id] = row.where
        examples.append(example)
    if not examples:
        raise InputError(f"{source} holds no rows: add at least one")
    return examples


def read_example(
    row: Row, fields: Mapping[str, str] = NO_FIELDS
) -> tuple[Example | None, Schema | None, list[str]]:
    """The example of a row, its schema, and all that is wrong with it, in the names of its schema."""
    if row.fault:
        return None, None, [row.fault]
    try:
        schema = find_schema(row.value, fields)
    except ValueError as error:
        return None, None, [str(error)]
    value = canonical_row(row.value, schema)
    if faults := row_faults(value):
        return None, schema, [in_words_of(schema, fault) for fault in faults]
    return Example.from_dict(value), schema, []


class Prompt(NamedTuple):
    """A prompt to write a rubric for.

    Attributes:
      example: with a criterion that stands for those to come.
      reference: a good answer, or "".
    """

    example: Example
    reference: str


_REFERENCES = ("reference", "reference_answer", "physician_response", "answer")


def load_prompts(source: str | Path, fields: Mapping[str, str] = NO_FIELDS) -> list[Prompt]:
    """Read the prompts of a source, in order, whether or not its rows have rubrics.

    A reference answer is what a row has under `reference`, `reference_answer`, `physician_response`,
    `answer`, or HealthBench's `ideal_completions_data`.

    Raises InputError as `load_examples` does.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for row in read_rows(source):
        value = row.value
        if isinstance(value, dict):
            names = (Schema("", **fields),) if fields else SCHEMAS
            schema = next((schema for schema in names if schema.prompt in value), SCHEMAS[0])
            value = value | {schema.rubrics: [{schema.criterion: "to be written", schema.points: 1}]}
        example, _, faults = read_example(row._replace(value=value), fields)
        if example is None:
            raise InputError(f"{row.where}: {faults[0]}")
        if (first := seen.setdefault(example.prompt_id, row.where)) != row.where:
            raise InputError(f"{row.where}: prompt_id {example.prompt_id!r} is already used at {first}")
        ideal = row.value.get("ideal_completions_data")
        texts = [row.value.get(name) for name in _REFERENCES]
        texts += [ideal.get("ideal_completion")] if isinstance(ideal, dict) else []
        reference = next((text for text in texts if isinstance(text, str) and text.strip()), "")
        prompts.append(Prompt(example, reference))
    if not prompts:
        raise InputError(f"{source} holds no prompts: add at least one")
    return prompts


def read_rows(source: str | Path) -> Iterator[Row]:
    """Every row of a source (see `load_examples`) in order, unchecked.

    Raises InputError for a source that cannot be read at all.
    """
    source = str(source)
    path = storage.locate(source) if storage.is_remote(source) else epath.Path(source)
    hub_id = _HUB_ID.fullmatch(source)
    if path.is_file() and (kind := re.search(r"\.(jsonl?|csv)(?:\.(gz|zst))?$", path.name)):
        read = {"jsonl": _jsonl, "json": _json, "csv": _csv}[kind[1]]
        return _opened(path, kind[2], read)
    if path.is_file() and path.suffix == ".parquet":
        return _by_datasets(source, lambda datasets: datasets.Dataset.from_parquet(source))
    if path.is_file():
        raise InputError(
            f"{source} is none of .jsonl, .json, .csv (also as .gz or .zst) and .parquet: convert it to one"
        )
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
        name = [part for part in hub_id.group("name", "config") if part]
        split = hub_id["split"] or "train"
        return _by_datasets(source, lambda datasets: datasets.load_dataset(*name, split=split))
    raise InputError(f"{source}: no such file or directory; check the path of the rows")


def _opened(path: epath.Path, packed: str | None, read: Callable) -> Iterator[Row]:
    with path.open("rb") as file:
        if packed is None:
            yield from read(str(path), file)
            return
        import pyarrow as pa

        codec = {"gz": "gzip", "zst": "zstd"}[packed]
        try:
            with io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), codec)) as unpacked:
                yield from read(str(path), unpacked)
        except OSError as error:
            raise InputError(f"{path}: cannot be unpacked as {packed} ({error}): fetch it again") from None


def _jsonl(path: str, file: BinaryIO) -> Iterator[Row]:
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


def _json(path: str, file: BinaryIO) -> Iterator[Row]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); write a list of objects, in UTF-8") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    return _numbered(path, rows)


def _csv(path: str, file: BinaryIO) -> Iterator[Row]:
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    csv.field_size_limit(2**31 - 1)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield Row(
                    where, None, "has not as many columns as the first line: quote what has commas in it"
                )
            else:
                yield Row(where, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}:{reader.line_num}: not valid CSV ({error}); write it in UTF-8, with a line of names"
        ) from None


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
