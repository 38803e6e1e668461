"""Rows of the schemas that exist, brought into the one of this package, which is HealthBench's."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from srrl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schema:
    """The names that a schema has for the fields of a row.

    Attributes:
      prompt, rubrics: of a row.
      criterion, points: of an item of the rubric.
      prompt_id: of a row.
      tags: fields whose values become tags of the row, as "field:value".
    """

    name: str
    prompt: str = "prompt"
    rubrics: str = "rubrics"
    criterion: str = "criterion"
    points: str = "points"
    prompt_id: str = "prompt_id"
    tags: tuple[str, ...] = ()


# The first whose `prompt` and `rubrics` a row has is that of the row.
SCHEMAS = (
    Schema("HealthBench"),
    Schema("chat messages", prompt="messages"),
    Schema(
        "HealthBench Professional",
        prompt="conversation",
        rubrics="rubric_items",
        criterion="criterion_text",
        prompt_id="id",
        tags=("use_case", "type", "difficulty", "specialty"),
    ),
    Schema("Rubrics as Rewards", "question", "rubric", "description", "weight"),
    Schema("Rubrics as Rewards, prompt", "prompt", "rubric", "description", "weight"),
)
FIELDS = ("prompt", "rubrics", "criterion", "points")  # what `data.fields` may name


def find_schema(row: Any, fields: Mapping[str, str] = MappingProxyType({})) -> Schema:
    """The schema of a row: that which `fields` names, with HealthBench's names for the rest, or the first
    known one that fits.

    Raises:
      ValueError: none fits; the message says how to name the fields.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    schemas = (Schema("data.fields", **fields),) if fields else SCHEMAS
    found = next((s for s in schemas if s.prompt in row and s.rubrics in row), None)
    if found is None:
        missing = " and ".join(
            f"`{key}`" for key in (schemas[0].prompt, schemas[0].rubrics) if key not in row
        )
        known = "; ".join(f"{s.name}: `{s.prompt}` and `{s.rubrics}`" for s in schemas)
        raise ValueError(
            f"no {missing}: add it, or name the fields by data.fields "
            "(of `srrl data`: --field prompt=question), e.g. {prompt: question, rubrics: rubric, "
            f"criterion: text, points: weight}}. The row has {', '.join(map(repr, row)) or 'no fields'}; "
            f"known are {known}"
        )
    return found


def canonical_row(row: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The row of `schema` with the names and types of HealthBench's; what cannot be read stays as it is.

    A prompt that is a string is the user's one turn, of an object its `messages` are taken; content parts of
    text are joined; points in digits are numbers; columns of JSON (of CSV files) are read.
    """
    prompt, rubrics = _parsed(row[schema.prompt]), _parsed(row[schema.rubrics])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, dict):
        prompt = prompt.get("messages", prompt)
    named = {"prompt_id": schema.prompt_id, "example_tags": "example_tags"}
    result = {new: row[old] for new, old in named.items() if row.get(old) not in (None, "")}
    if "example_tags" in result:
        result["example_tags"] = _parsed(result["example_tags"])
    elif schema.tags:
        result["example_tags"] = [f"{key}:{row[key]}" for key in schema.tags if row.get(key)]
    return result | {
        "prompt": [_turn(turn) for turn in prompt] if isinstance(prompt, list | tuple) else prompt,
        "rubrics": [_item(item, schema) for item in rubrics]
        if isinstance(rubrics, list | tuple)
        else rubrics,
    }


def parse_fields(given: Sequence[str] | None) -> dict[str, str]:
    """The mapping of options NAME=FIELD. Raises InputError for another NAME, or no FIELD."""
    fields = dict(pair.partition("=")[::2] for pair in given or ())
    if unknown := [name for name, value in fields.items() if name not in FIELDS or not value]:
        raise InputError(f"--field {unknown[0]}: give NAME=FIELD, where NAME is one of {', '.join(FIELDS)}")
    return fields


def in_words_of(schema: Schema, fault: str) -> str:
    """A fault of the canonical row under the names that the file has for its fields."""
    for name in FIELDS:
        fault = re.sub(rf"(?<=[`.]){name}(?=[`.\[])", getattr(schema, name), fault)
    return fault


def _parsed(value: Any) -> Any:
    """A list or object that stands as text, as in a column of a CSV file."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list | tuple):
        return turn
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else None
        for part in turn["content"]
    ]
    return turn if None in texts else turn | {"content": "".join(texts)}


def _item(item: Any, schema: Schema) -> Any:
    if not isinstance(item, dict):
        return item
    named = {schema.criterion: "criterion", schema.points: "points", "tags": "tags"}
    result = {new: item[old] for old, new in named.items() if old in item}
    if isinstance(result.get("points"), str):
        try:
            points = float(result["points"])
        except ValueError:
            return result
        result["points"] = int(points) if math.isfinite(points) and points == int(points) else points
    return result
