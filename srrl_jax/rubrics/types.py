"""One example: a conversation to answer and the rubric that its answers are graded by."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypedDict

from srrl_jax.rubrics.faults import row_faults


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Criterion:
    """One rubric item. `points` is what a response earns for meeting it, below 0 for a fault.

    Only where nothing is scored, as with physicians' labels, may `points` be NaN: not known.
    """

    criterion: str
    points: float
    tags: tuple[str, ...] = ()

    @property
    def axis(self) -> str:
        """What of a response it judges: "accuracy" for HealthBench's tag "axis:accuracy"; "" without one."""
        return next((tag.removeprefix("axis:") for tag in self.tags if tag.startswith("axis:")), "")


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
        any other key is left alone. Raises ValueError with the first of `row_faults`.
        """
        if faults := row_faults(row):
            raise ValueError(faults[0])
        prompt = tuple(Message(role=turn["role"], content=turn["content"]) for turn in row["prompt"])
        rubrics = tuple(
            Criterion(item["criterion"], item["points"], tuple(item.get("tags") or ()))
            for item in row["rubrics"]
        )
        prompt_id = row.get("prompt_id")
        if prompt_id is None:
            prompt_id = _hash(prompt)
        return cls(prompt, rubrics, prompt_id, tuple(row.get("example_tags") or ()))

    @property
    def prompt_hash(self) -> str:
        """The same for the same conversation, whatever its `prompt_id`."""
        return _hash(self.prompt)

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


def _hash(prompt: tuple[Message, ...]) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:32]
