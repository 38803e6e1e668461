"""Rows of (conversation, criterion, label), such as HealthBench's meta-evaluation."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from srrl_jax.data import read_rows
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Criterion, Message, row_faults, text_faults

_POINTS = re.compile(r"\[(-?\d+(?:\.\d+)?)\]\s*(?=\S)")


class LabelRow(NamedTuple):
    """A response, a criterion, and what physicians said of it.

    Attributes:
      physicians: who gave each label; empty where the file does not say.
      category: what results are also broken down by, or "".
    """

    prompt: tuple[Message, ...]
    response: str
    criterion: Criterion
    labels: tuple[bool, ...]
    physicians: tuple[str, ...]
    category: str


def load_labels(source: str | Path) -> list[LabelRow]:
    """Reads rows of labels from any source that `srrl_jax.data` reads.

    A row is as HealthBench releases them: `prompt`, `completion`, `rubric`, `binary_labels` and,
    optional, `anonymized_physician_ids` and `category`. It may also be shorter: a `conversation`
    that ends with the assistant's turn for `prompt` and `completion`, `criterion` for `rubric`,
    one `label` for `binary_labels`. Points are those of `points`, or of a "[-3] " before the
    criterion's text, else NaN: the grader is then shown none, as in simple-evals. Where
    `label` is null, nobody was sure, and the row is left out.

    Raises InputError that names the line, the field and the mend.
    """
    labels = []
    for where, value, fault in read_rows(source):
        try:
            if fault:
                raise ValueError(fault)
            if not (isinstance(value, dict) and value.get("label", "") is None):
                labels.append(_label_row(value))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    if not labels:
        raise InputError(f"{source} holds no rows: add at least one")
    return labels


def _label_row(row: Any) -> LabelRow:
    if not isinstance(row, dict):
        raise ValueError("a row must be an object with a conversation, a criterion and labels")
    prompt, response = row.get("prompt"), row.get("completion")
    if "conversation" in row:
        prompt, response = _split(row["conversation"])
    if faults := text_faults({"completion": response}, "completion"):
        raise ValueError(f"{faults[0]}: the response that was labelled")
    criterion = row["criterion"] if "criterion" in row else row.get("rubric")
    points = row.get("points")
    if isinstance(criterion, str) and (match := _POINTS.match(criterion)):
        points, criterion = float(match[1]), criterion[match.end() :]
    faults = row_faults(
        {
            "prompt": prompt,
            "rubrics": [
                {"criterion": criterion, "points": 1 if points is None else points},
                {"criterion": "any", "points": 1},
            ],
        }
    )
    if faults:
        raise ValueError(faults[0].replace("rubrics[0].criterion", "rubric").replace("rubrics[0].", ""))
    labels = [row["label"]] if "label" in row else row.get("binary_labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, bool) for label in labels):
        raise ValueError("`binary_labels` must be a list of true and false, or `label` one of them")
    physicians = row.get("anonymized_physician_ids") or []
    if not isinstance(physicians, list) or len(physicians) not in (0, len(labels)):
        raise ValueError("`anonymized_physician_ids` must name one physician for each label")
    return LabelRow(
        tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt),
        response,
        Criterion(criterion, math.nan if points is None else points),
        tuple(labels),
        tuple(map(str, physicians)),
        str(row.get("category") or ""),
    )


def _split(conversation: Any) -> tuple[Any, Any]:
    """The conversation before its last turn, and what the assistant says there."""
    if not isinstance(conversation, list) or len(conversation) < 2:
        raise ValueError("`conversation` must be a list of turns, the last one the response")
    last = conversation[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise ValueError("`conversation` must end with the assistant's turn, which is graded")
    return conversation[:-1], last.get("content")
