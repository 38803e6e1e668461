"""Lessons in grading: pairs of a response and a criterion on which a teacher's verdict is known.

A lesson is a task like any other. Its prompt is the grader's prompt, its rubric has one criterion (the
teacher's verdict is given), and that is decided by reading the completion, not by a judge.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from srrl_jax.data import step_rows
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader, GradingItem
from srrl_jax.rubrics import Criterion, Example, row_faults, visible_response
from srrl_jax.sampling import Completion
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task

RIGHT = (Criterion("Gives the teacher's verdict", 1.0),)


def load_lessons(
    source: str, grader: Grader, config: TrainConfig, first_row: int, positions: int
) -> list[Task]:
    """A task for each readable verdict of a file that `srrl grade` wrote, numbered from `first_row` on.

    Args:
      positions: that the model has.
    Raises:
      InputError: names file, line and mend; or the length, and the limit that it is over.
    """
    limit = min(positions - config.rollout.max_new_tokens, config.rollout.max_prompt_tokens or positions)
    lessons: list[Task] = []
    for number, row in enumerate(iter_jsonl(source), start=1):
        for item, met, reason in _pairs(row, f"{source}: object {number}"):
            prefix, (branch,) = grader.encode(item)
            prompt = prefix + branch
            if len(prompt) > limit:
                raise InputError(
                    f"{source}: object {number}: the grader's prompt takes {len(prompt)} tokens, over "
                    f"{limit} (rollout.max_prompt_tokens, or what rollout.max_new_tokens leaves of the "
                    f"model's {positions} positions); leave the row out"
                )
            opening = grader.grader_prompt.opening + (
                grader.grader_prompt.skeleton if grader.grader_prompt.forced else ""
            )
            name = f"lesson:{row.get('prompt_id', number)}:{len(lessons)}"
            text = grader.tokenizer.decode(prompt)
            example = Example(({"role": "user", "content": text},), RIGHT, name)
            reply = _reply(grader, met, reason)
            if len(reply) > config.rollout.max_new_tokens and config.data.teacher_loss != "grpo":
                raise InputError(
                    f"{source}: object {number}: the teacher's reply takes {len(reply)} tokens, over "
                    f"rollout.max_new_tokens ({config.rollout.max_new_tokens}); enlarge it "
                    "or shorten the explanation"
                )
            lessons.append(Task(example, prompt, opening, first_row + len(lessons), met, reply))
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


def with_replies(
    tasks: Sequence[Task], groups: Sequence[Sequence[Completion]], scored: np.ndarray, how: str
) -> tuple[list[Sequence[Completion]], np.ndarray, np.ndarray]:
    """Groups of which the last completion of a lesson is the teacher's reply, to be learnt by cross-entropy.

    Args:
      scored: bool [N, G], whose tokens count.
      how: `data.teacher_loss`; under "sft" no other completion of a lesson counts; "grpo" changes
        nothing.
    Returns:
      The groups, `scored`, and bool [N, G], true at the teacher's replies.
    """
    groups, scored, taught = list(groups), scored.copy(), np.zeros(scored.shape, bool)
    for i, task in enumerate(tasks):
        if task.met is not None and how != "grpo":
            tokens = np.array(task.reply, np.int32)
            groups[i] = [*groups[i][:-1], Completion(tokens, np.zeros(len(tokens), np.float32), False)]
            scored[i] &= how == "both"
            scored[i, -1] = taught[i, -1] = True
    return groups, scored, taught


def _reply(grader: Grader, met: bool, reason: str) -> tuple[int, ...]:
    """A verdict as the grader would write it, up to its stop token."""
    tokenizer, question = grader.tokenizer, grader.grader_prompt
    text = json.dumps({"explanation": reason, "criteria_met": met}, ensure_ascii=False)
    if question.forced:
        return *question.replies[not met], tokenizer.stop_ids[0]
    thought = "</think>\n\n" if question.opening else ""
    return *tokenizer.encode(thought + tokenizer.quote(text)), tokenizer.stop_ids[0]


def _pairs(row: dict[str, Any], where: str) -> list[tuple[GradingItem, bool, str]]:
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
        (GradingItem(example.prompt, text, [criterion]), verdict["met"], verdict.get("explanation") or "")
        for criterion, verdict in zip(example.rubrics, verdicts, strict=True)
        if isinstance(verdict, dict) and isinstance(verdict.get("met"), bool)
    ]
