"""What is wrong with a row, field by field, and how to mend it."""

import re
from collections.abc import Iterator
from typing import Any

_MOST_POINTS = 1e6
_HALF = re.compile("[\ud800-\udfff]")


def row_faults(row: Any) -> list[str]:
    """Every fault of a row in HealthBench's schema, each with the field and the mend; [] for a good row.

    Only `prompt` [{role, content}] and `rubrics` [{criterion, points}] are required; `tags`,
    `example_tags` and `prompt_id` are checked where present and any other key is left alone.
    """
    if not isinstance(row, dict):
        return [f"a row must be an object with `prompt` and `rubrics`, not {_is(row)}"]
    return [*_prompt(row), *_rubrics(row), *_prompt_id(row), *_tags(row, "example_tags")]


def text_faults(item: dict[str, Any], key: str) -> list[str]:
    """What is wrong with a text that a row has to have, such as a response to grade."""
    return list(_text(item, key, may_be_empty=True))


def _prompt(row: dict[str, Any]) -> Iterator[str]:
    form = "{role, content}"
    yield from _list(row, "prompt", form)
    for where, turn in _items(row, "prompt"):
        if not isinstance(turn, dict):
            yield f"`{where}` must be an object {form}, not {_is(turn)}"
            continue
        yield from _text(turn, "role", f"{where}.")
        if isinstance(turn.get("content"), list | tuple):
            yield f"`{where}.content` has parts that are no text, which is all that is read: leave them out"
        else:
            yield from _text(turn, "content", f"{where}.", may_be_empty=True)
    turns = row.get("prompt")
    if isinstance(turns, list | tuple) and turns and isinstance(turns[-1], dict):
        if turns[-1].get("role") == "assistant":  # a chat template would begin another turn after it
            yield "`prompt` ends with the assistant's turn: leave it out, so that the user's is the last"


def _rubrics(row: dict[str, Any]) -> Iterator[str]:
    form = "{criterion, points}"
    faults = list(_list(row, "rubrics", form))
    for where, item in _items(row, "rubrics"):
        if not isinstance(item, dict):
            faults.append(f"`{where}` must be an object {form}, not {_is(item)}")
            continue
        faults += [
            *_text(item, "criterion", f"{where}."),
            *_points(item, f"{where}."),
            *_tags(item, "tags", f"{where}."),
        ]
    yield from faults
    if not faults and not any(item["points"] > 0 for item in row["rubrics"]):
        yield (
            "`rubrics` has no criterion with positive points, so no response could be scored: "
            "give at least one criterion points above 0"
        )


def _prompt_id(row: dict[str, Any]) -> Iterator[str]:
    if row.get("prompt_id") is not None:
        yield from _text(row, "prompt_id")


def _list(row: dict[str, Any], key: str, form: str) -> Iterator[str]:
    if key not in row:
        yield f"no `{key}`: add a list of {form}"
    elif not isinstance(row[key], list | tuple):
        yield f"`{key}` must be a list of {form}, not {_is(row[key])}"
    elif not row[key]:
        yield f"`{key}` is empty: it needs at least one {form}"


def _items(row: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    items = row.get(key)
    return [(f"{key}[{i}]", x) for i, x in enumerate(items)] if isinstance(items, list | tuple) else []


def _text(item: dict[str, Any], key: str, where: str = "", may_be_empty: bool = False) -> Iterator[str]:
    if key not in item:
        yield f"`{where}{key}` is missing: add a string"
    elif not isinstance(item[key], str):
        yield f"`{where}{key}` must be a string, not {_is(item[key])}"
    elif not may_be_empty and not item[key].strip():
        yield f"`{where}{key}` is empty: give it some text"
    elif _HALF.search(item[key]):
        yield f"`{where}{key}` holds half of a surrogate pair, which no tokenizer reads: write it anew"


def _points(item: dict[str, Any], where: str) -> Iterator[str]:
    points = item.get("points")
    if "points" not in item:
        yield f"`{where}points` is missing: add a number, below 0 for a fault"
    elif isinstance(points, bool) or not isinstance(points, int | float):
        yield f"`{where}points` must be a number, not {_is(points)}"
    elif not abs(points) <= _MOST_POINTS:  # true for NaN too
        yield f"`{where}points` is {points}: give a number of at most a million"


def _tags(item: dict[str, Any], key: str, where: str = "") -> Iterator[str]:
    tags = item.get(key)
    if tags is None:
        return
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        yield f"`{where}{key}` must be a list of strings"


def _is(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
