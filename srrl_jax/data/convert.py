"""Rows from one form into another, whole or in part."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from srrl_jax import storage
from srrl_jax.data.schemas import canonical_row
from srrl_jax.data.select import select, subtract
from srrl_jax.data.sources import NO_FIELDS, load_examples, read_example, read_rows
from srrl_jax.data.tfds import write_tfds
from srrl_jax.errors import InputError


def convert(
    source: str,
    out: str | Path,
    to: Literal["jsonl", "tfds"],
    *,
    minus: str | None = None,
    where: Sequence[str] = (),
    fields: Mapping[str, str] = NO_FIELDS,
) -> int:
    """Writes the rows of `source` to `out` and returns their number.

    Every key of a row stays, beside HealthBench's where it has another schema (`fields` names that of
    `source`). `minus` is a source whose rows are left out (`subtract`), `where` the
    tags to keep (`select`). Raises InputError for bad rows or tags, and when `out` is in use.
    """
    examples = load_examples(source, fields)
    if minus is not None:
        examples = subtract(examples, load_examples(minus))
    examples = select(examples, where)
    raw = {}
    for row in read_rows(source):
        example, schema, _ = read_example(row, fields)
        raw[example.prompt_id] = row.value | canonical_row(row.value, schema)
    rows = [
        raw[e.prompt_id] | {"prompt_id": e.prompt_id, "rubrics": e.to_dict()["rubrics"]} for e in examples
    ]
    if to == "tfds":
        write_tfds(rows, out)
        return len(rows)
    out = storage.locate(out)
    if out.exists():
        raise InputError(f"{out} is in use: give a new file to write the rows to")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.replace(out, [text.encode()])
    return len(rows)
