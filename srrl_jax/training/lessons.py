"""Lessons in grading: pairs of a response and a criterion on which a teacher's verdict is known.

A lesson is a task like any other. Its prompt is the grader's prompt, its rubric has one criterion (the
teacher's verdict is given), and that is decided by reading the completion, not by a judge.
"""

from collections.abc import Sequence
from typing import Any

from srrl_jax.data import step_rows
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader, GradingItem
from srrl_jax.grading.asking import SKELETON
from srrl_jax.rubrics import Criterion, Example, row_faults, visible_response
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task

RIGHT = (Criterion("Gives the teacher's verdict", 1.0),)


def load_lessons(source: str, grader: Grader, config: TrainConfig, first_row: int) -> list[Task]:
    """A task for each readable verdict of a file that `srrl grade` wrote, numbered from `first_row` on.

    Raises:
      InputError: names file, line and mend; or the length and `rollout.prompt_buckets` to enlarge.
    """
    lessons: list[Task] = []
    for number, row in enumerate(iter_jsonl(source), start=1):
        for item, met in _pairs(row, f"{source}: object {number}"):
            prefix, (branch,) = grader.encode(item)
            prompt, longest = prefix + branch, config.rollout.prompt_buckets[-1]
            if len(prompt) > longest:
                raise InputError(
                    f"{source}: object {number}: the grader's prompt takes {len(prompt)} tokens, over the "
                    f"largest of rollout.prompt_buckets ({longest}); enlarge it or leave the row out"
                )
            opening = grader.question.opening + (SKELETON if grader.question.forced else "")
            name = f"lesson:{row.get('prompt_id', number)}:{len(lessons)}"
            text = grader.tokenizer.decode(prompt)
            example = Example(({"role": "user", "content": text},), RIGHT, name)
            lessons.append(Task(example, prompt, opening, first_row + len(lessons), met))
    if not lessons:
        raise InputError(
            f"data.teacher: {source} has no verdict that could be read; write it by `srrl grade`"
        )
    return lessons


def with_lessons(
    batch: Sequence[Task], lessons: Sequence[Task], config: TrainConfig, step: int
) -> list[Task]:
    """The tasks of `step` (counted from 0), the last of them replaced by the lessons that are due.

    Lessons are `data.teacher_share` of all tasks so far, to the whole number below, in shuffled epochs.
    """
    before, after = (int(config.data.teacher_share * len(batch) * n + 1e-9) for n in (step, step + 1))
    due = [lessons[step_rows(len(lessons), 1, place, config.seed)[0]] for place in range(before, after)]
    return [*batch[: len(batch) - len(due)], *due]


def _pairs(row: dict[str, Any], where: str) -> list[tuple[GradingItem, bool]]:
    faults = row_faults(row)
    text = row.get("response")
    if text is None and isinstance(row.get("completion"), str):
        text = visible_response(row["completion"])
    verdicts = row.get("verdicts")
    if faults or not isinstance(text, str) or not isinstance(verdicts, list):
        raise InputError(
            f"{where}: {faults[0] if faults else 'needs response (or completion) and verdicts'}; "
            "data.teacher is a file that `srrl grade` wrote"
        )
    example = Example.from_dict(row)
    if len(verdicts) != len(example.rubrics):
        raise InputError(
            f"{where}: {len(verdicts)} verdicts on {len(example.rubrics)} criteria; grade it again"
        )
    return [
        (GradingItem(example.prompt, text, [criterion]), verdict["met"])
        for criterion, verdict in zip(example.rubrics, verdicts, strict=True)
        if isinstance(verdict, dict) and isinstance(verdict.get("met"), bool)
    ]
