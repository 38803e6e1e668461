"""Rubrics for prompts that have none: what a writer is asked, and how its reply is read."""

import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib import resources

from srrl_jax.rubrics.types import Criterion, Message
from srrl_jax.rubrics.verdicts import visible_response

AXES = ("accuracy", "completeness", "communication_quality", "context_awareness", "instruction_following")
LEAST, MOST = 4, 16  # criteria that are asked for
ALIKE = 0.85  # of two criteria this similar the second is left out
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


def writer_prompt(messages: Sequence[Message], reference: str = "") -> str:
    """The user message that asks for a rubric of the conversation's next answer.

    Args:
      reference: a good answer, where there is one.
    """
    folder = resources.files("srrl_jax.rubrics") / "templates"
    template = (folder / "writer.txt").read_text(encoding="utf-8")
    values = {
        "{least}": str(LEAST),
        "{most}": str(MOST),
        "{conversation}": "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages),
        "{reference}": f"\n# A good answer, for reference\n{reference}" if reference else "",
    }
    # In one pass: what a text says in braces is not a placeholder.
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], template).strip()


def parse_criteria(text: str) -> list[Criterion]:
    """The criteria of a writer's reply, without near-duplicates.

    The reply is one JSON list, bare or in one fence, of {criterion, points, axis}, as `writer_prompt` asks;
    what differs is refused as a whole, for half a rubric scores otherwise than it reads.

    Raises:
      ValueError: says what is wrong with it.
    """
    reply = visible_response(text)
    fenced = _FENCED.fullmatch(reply)
    try:
        items = json.loads(fenced[1] if fenced else reply)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON list alone: {error}") from None
    if not isinstance(items, list) or not items:
        raise ValueError("not a list of criteria")
    criteria = without_near_duplicates([_criterion(number, item) for number, item in enumerate(items, 1)])
    if not any(criterion.points > 0 for criterion in criteria):
        raise ValueError("no criterion has points above 0")
    if len(criteria) < LEAST:
        raise ValueError(f"{len(criteria)} different criteria; at least {LEAST} were asked for")
    return criteria


def _criterion(number: int, item: object) -> Criterion:
    if not isinstance(item, dict) or not item.keys() >= {"criterion", "points"}:
        raise ValueError(f"item {number} is no object with criterion and points")
    text, points, axis = item["criterion"], item["points"], item.get("axis")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"item {number}: criterion is no text")
    if isinstance(points, bool) or not isinstance(points, int | float) or not 0 < abs(points) <= 10:
        raise ValueError(f"item {number}: points must be from 1 to 10 or from -10 to -1")
    if axis is not None and axis not in AXES:
        raise ValueError(f"item {number}: axis must be one of {', '.join(AXES)}")
    return Criterion(text.strip(), points, (f"axis:{axis}",) if axis else ())


def without_near_duplicates(criteria: Sequence[Criterion]) -> list[Criterion]:
    """The criteria without those that are `ALIKE` an earlier one of the same sign, letter for letter.

    A merit and a fault may differ by a word alone, and both are kept.
    """
    kept: list[Criterion] = []
    for criterion in criteria:
        if not any(
            (criterion.points > 0) == (other.points > 0)
            and SequenceMatcher(None, *map(_letters, (other, criterion)), autojunk=False).ratio() >= ALIKE
            for other in kept
        ):
            kept.append(criterion)
    return kept


def _letters(criterion: Criterion) -> str:
    return " ".join(re.findall(r"\w+", criterion.criterion.casefold()))
