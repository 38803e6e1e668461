"""Everything that is wrong with a file of rows, and what is in it."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.data.sources import NO_FIELDS, Row, read_example, read_rows
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example

_FIGURES = {
    "min": np.min,
    "median": np.median,
    "mean": np.mean,
    "p90": partial(np.percentile, q=90),
    "p99": partial(np.percentile, q=99),
    "max": np.max,
}


class Checked(NamedTuple):
    """What `check_rows` found.

    Attributes:
      rows: how many were read, good and bad.
      faults: "file:line: field and mend", in order.
      examples: the rows that have the right form, with or without other faults.
      schemas: how many rows have each schema, by its name.
      prompt_tokens, criterion_tokens: lengths under the tokenizer; empty without one.
    """

    rows: int
    faults: list[str]
    examples: list[Example]
    schemas: Counter[str]
    prompt_tokens: list[int]
    criterion_tokens: list[int]


def check_rows(
    source: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    thinking: bool = False,
    max_prompt_tokens: int | None = None,
    max_points: float = 10,
    fields: Mapping[str, str] = NO_FIELDS,
) -> Checked:
    """Checks every row of a source and goes on after a fault.

    Faults: what `row_faults` names, JSON that cannot be read, a `prompt_id` that was there before, a
    prompt with its rubric again, points of 0 or beyond `max_points` (HealthBench: 10), a prompt that the
    chat template refuses, or that takes more than `max_prompt_tokens` as rendered. Raises InputError only
    for a source that cannot be read at all.
    """
    if max_prompt_tokens is not None and tokenizer is None:
        raise InputError("a limit of prompt tokens needs a tokenizer: give the directory of one")
    checked = Checked(0, [], [], Counter(), [], [])
    ids: dict[str, str] = {}
    contents: dict[tuple, str] = {}
    rows = 0
    for row in read_rows(source):
        rows += 1
        example, schema, found = read_example(row, fields)
        if schema is not None:
            checked.schemas[schema.name] += 1
        if example is not None:
            checked.examples.append(example)
            found = [*_repeats(example, row, ids, contents), *_values(example, max_points)]
            if tokenizer is not None:
                found += _lengths(example, tokenizer, thinking, max_prompt_tokens, checked)
        checked.faults.extend(f"{row.where}: {fault}" for fault in found)
    if not rows:
        checked.faults.append(f"{source} holds no rows: add at least one")
    return checked._replace(rows=rows)


def _text(example: Example) -> tuple:
    return tuple((turn["role"], turn["content"]) for turn in example.prompt)


def _repeats(example: Example, row: Row, ids: dict[str, str], contents: dict[tuple, str]) -> list[str]:
    by_id = ids.setdefault(example.prompt_id, row.where)
    by_content = contents.setdefault((_text(example), example.rubrics), row.where)
    if by_id != row.where:
        mend = "remove one of the rows, or give each its own prompt_id"
        return [f"`prompt_id` {example.prompt_id!r} is already used at {by_id}: {mend}"]
    if by_content != row.where:
        return [f"`prompt` and `rubrics` are the same as at {by_content}: remove one of the rows"]
    return []


def _values(example: Example, max_points: float) -> list[str]:
    faults = []
    for index, item in enumerate(example.rubrics):
        name = f"`rubrics[{index}].points`"
        if item.points == 0:
            faults.append(f"{name} is 0, so it counts for nothing: give it points or remove it")
        elif abs(item.points) > max_points:
            faults.append(f"{name} is {item.points}, beyond {max_points:g}: scale it, or allow more points")
    return faults


def _lengths(
    example: Example, tokenizer: Tokenizer, thinking: bool, limit: int | None, checked: Checked
) -> list[str]:
    checked.criterion_tokens.extend(
        len(tokenizer.encode(tokenizer.quote(item.criterion))) for item in example.rubrics
    )
    try:
        rendered = tokenizer.render(list(example.prompt), thinking=thinking)
    except InputError as error:
        return [f"`prompt`: {error}"]
    tokens = len(tokenizer.encode(rendered))
    checked.prompt_tokens.append(tokens)
    if limit is not None and tokens > limit:
        return [f"`prompt` takes {tokens} tokens, over {limit}: shorten it, remove the row or allow more"]
    return []


def profile(checked: Checked) -> Table:
    """The rows in figures: how many, their criteria, points, turns, tags, and lengths in tokens."""
    table = Table("", "n", *_FIGURES, title="Profile")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in _profile(checked).items():
        table.add_row(name, str(figures["n"]), *[f"{figures[key]:.4g}" for key in _FIGURES])
    return table


def summary(checked: Checked) -> dict[str, Any]:
    """All that was found, as values of JSON."""
    return {
        "rows": checked.rows,
        "faults": checked.faults,
        "schemas": dict(checked.schemas),
        "profile": _profile(checked),
        "counts": counts(checked),
    }


def _profile(checked: Checked) -> dict[str, dict[str, float]]:
    examples = checked.examples
    items = [item for example in examples for item in example.rubrics]
    values = {
        "criteria of a row": [len(e.rubrics) for e in examples],
        "positive points of a row": [sum(max(c.points, 0) for c in e.rubrics) for e in examples],
        "points of a criterion": [c.points for c in items],
        "turns of a prompt": [len(e.prompt) for e in examples],
        "tokens of a prompt": checked.prompt_tokens,
        "tokens of a criterion": checked.criterion_tokens,
    }
    return {
        name: {"n": len(x)} | {key: float(figure(x)) for key, figure in _FIGURES.items()}
        for name, x in values.items()
        if x
    }


def counts(checked: Checked) -> list[str]:
    """Lines that count criteria, roles and tags."""
    examples = checked.examples
    items = [item for example in examples for item in example.rubrics]
    tags = Counter(tag for e in examples for tag in e.example_tags)
    tags.update(tag for item in items for tag in item.tags if not tag.startswith("cluster:"))
    kinds: dict[str, list[str]] = {}
    for tag, number in sorted(tags.items(), key=lambda pair: -pair[1]):
        kind, _, name = tag.partition(":")
        kinds.setdefault(kind, []).append(f"{name or kind} {number}")
    repeated = sum(len({c.criterion for c in e.rubrics}) < len(e.rubrics) for e in examples)
    roles = Counter(turn["role"] for e in examples for turn in e.prompt)
    return [
        f"schema: {', '.join(f'{name} {number}' for name, number in checked.schemas.items())}",
        f"criteria: {len(items)}, of them {sum(c.points < 0 for c in items)} with negative points; "
        f"rows that name a criterion twice: {repeated}",
        f"prompts: {len(set(map(_text, examples)))} different ones",
        f"role: {', '.join(f'{role} {number}' for role, number in roles.most_common())}",
        *[f"{kind}: {', '.join(names)}" for kind, names in kinds.items()],
    ]
