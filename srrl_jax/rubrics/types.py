"""One example: a conversation to answer and the rubric that its answers are graded by."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Criterion:
    """One rubric item. `points` is what a response earns for meeting it, below 0 for a fault."""

    criterion: str
    points: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A conversation of one or more turns and at least one criterion with positive points."""

    prompt: tuple[Message, ...]
    rubrics: tuple[Criterion, ...]
    prompt_id: str
    example_tags: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Example":
        """Read a row in HealthBench's schema.

        Only `prompt` [{role, content}] and `rubrics` [{criterion, points}] are required; `tags`,
        `example_tags` and `prompt_id` (default: a hash of the prompt) are read where present and
        any other key is left alone. Raises ValueError that names the field and the mend.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object with `prompt` and `rubrics`, not {_is(row)}")
        prompt = tuple(
            Message(
                role=_text(turn, "role", where),
                content=_text(turn, "content", where, may_be_empty=True),
            )
            for where, turn in _objects(row, "prompt", "{role, content}")
        )
        rubrics = tuple(
            Criterion(
                criterion=_text(item, "criterion", where),
                points=_points(item, where),
                tags=_tags(item, "tags", f"{where}."),
            )
            for where, item in _objects(row, "rubrics", "{criterion, points}")
        )
        if not any(item.points > 0 for item in rubrics):
            raise ValueError(
                "`rubrics` has no criterion with positive points, so no response could be scored: "
                "give at least one criterion points above 0"
            )
        if row.get("prompt_id") is None:
            prompt_id = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:32]
        else:
            prompt_id = _text(row, "prompt_id")
        return cls(prompt, rubrics, prompt_id, _tags(row, "example_tags"))

    def to_dict(self) -> dict[str, Any]:
        """The row in HealthBench's schema: `Example.from_dict` of it equals this example."""
        return {
            "prompt": [dict(turn) for turn in self.prompt],
            "prompt_id": self.prompt_id,
            "rubrics": [
                {"criterion": item.criterion, "points": item.points, "tags": list(item.tags)}
                for item in self.rubrics
            ],
            "example_tags": list(self.example_tags),
        }


def _is(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _objects(row: dict[str, Any], key: str, form: str) -> list[tuple[str, dict[str, Any]]]:
    """The non-empty list of objects under `key`, each with its name for messages."""
    if key not in row:
        raise ValueError(f"no `{key}`: add a list of {form}")
    if not isinstance(row[key], list | tuple):
        raise ValueError(f"`{key}` must be a list of {form}, not {_is(row[key])}")
    if not row[key]:
        raise ValueError(f"`{key}` is empty: it needs at least one {form}")
    for index, item in enumerate(row[key]):
        if not isinstance(item, dict):
            raise ValueError(f"`{key}[{index}]` must be an object {form}, not {_is(item)}")
    return [(f"{key}[{index}]", item) for index, item in enumerate(row[key])]


def _text(item: dict[str, Any], key: str, where: str = "", may_be_empty: bool = False) -> str:
    name = f"{where}.{key}" if where else key
    if key not in item:
        raise ValueError(f"`{name}` is missing: add a string")
    if not isinstance(item[key], str):
        raise ValueError(f"`{name}` must be a string, not {_is(item[key])}")
    if not may_be_empty and not item[key].strip():
        raise ValueError(f"`{name}` is empty: give it some text")
    return item[key]


def _points(item: dict[str, Any], where: str) -> float:
    if "points" not in item:
        raise ValueError(f"`{where}.points` is missing: add a number, below 0 for a fault")
    points = item["points"]
    if isinstance(points, bool) or not isinstance(points, int | float):
        raise ValueError(f"`{where}.points` must be a number, not {_is(points)}")
    if not abs(points) <= 1e6:  # false for NaN too
        raise ValueError(f"`{where}.points` is {points}: give a number of at most a million")
    return points


def _tags(item: dict[str, Any], key: str, where: str = "") -> tuple[str, ...]:
    tags = item.get(key)
    if tags is None:
        return ()
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"`{where}{key}` must be a list of strings")
    return tuple(tags)
