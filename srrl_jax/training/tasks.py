"""The rows of a run as tasks: read, selected, checked and tokenized."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from srrl_jax.checkpoints.loading import read_config
from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.data import check_disjoint, load_examples, select, subtract
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader
from srrl_jax.rubrics import Example
from srrl_jax.sampling import RowLengths
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task, encode_tasks
from srrl_jax.training.lessons import load_lessons
from srrl_jax.training.shapes import RunLengths


class Tasks(NamedTuple):
    """Training rows, lessons (none without data.teacher) and held-out rows (none without data.eval).

    Attributes:
      identity: hashes of them and of the templates and the tokenizer that made them tokens.
      dropped: the rows that were too long, in words.
      instructions: tokens that all prompts of the grader begin with.
    """

    train: list[Task]
    lessons: list[Task]
    held_out: list[Task]
    identity: dict[str, str]
    dropped: list[str]
    instructions: tuple[int, ...]

    def lengths(self, config: TrainConfig) -> RunLengths:
        """Of all rows that are sampled and graded."""
        rollout = [RowLengths(len(t.prompt), [0] * config.group_size) for t in self.train + self.lessons]
        rollout += [RowLengths(len(t.prompt), [0] * config.eval.samples) for t in self.held_out]
        return RunLengths(rollout, [t.asked for t in self.train + self.held_out], self.instructions)


def load_tasks(config: TrainConfig, tokenizer: Tokenizer, rows: Sequence[Example] | None = None) -> Tasks:
    """Reads and tokenizes all rows; `rows` take the place of data.train.

    Raises:
      InputError: what cannot be read, is too long, or is in training and held-out rows alike; a weight of an
        axis that no row has.
    """
    examples = load_examples(config.data.train, config.data.fields) if rows is None else rows
    if config.data.minus is not None:
        examples = subtract(examples, load_examples(config.data.minus, config.data.fields))
    examples = select(examples, config.data.where)
    axes = sorted({item.axis for row in examples for item in row.rubrics} - {""})
    for axis in config.reward.axis_weights:
        if axis not in axes:
            known = f"the axes are {', '.join(axes)}" if axes else "none has an axis"
            raise InputError(f"reward.axis_weights.{axis}: no criterion of the rows has this axis; {known}")
    grader = Grader.at(config.grading, tokenizer)
    positions = read_config(config.model).max_position_embeddings
    train, dropped, instructions = encode_tasks(examples, config.data.train, grader, config, positions)
    if not train:
        raise InputError(f"{config.data.train}: no row is left; the first that was too long: {dropped[0]}")
    identity = {"rows": _of_rows(examples), "grader_template": _sha256(config.grading.read_template())}
    identity |= zip(("tokenizer", "chat_template"), map(_sha256, tokenizer.made_of), strict=True)
    if config.teacher:
        identity["teacher_template"] = _sha256(config.teacher.read_template())
    lessons, held_out = [], []
    if config.data.teacher is not None:
        lessons = load_lessons(config.data.teacher, grader, config, len(examples), positions)
        identity["lessons"] = _sha256(json.dumps(read_jsonl(config.data.teacher)))
    if config.data.eval is not None:
        held_out = load_examples(config.data.eval, config.data.fields)
        check_disjoint(examples, held_out)
        identity["held_out_rows"] = _of_rows(held_out)
        rows = held_out[: config.eval.rows]
        held_out, more, others = encode_tasks(rows, config.data.eval, grader, config, positions)
        dropped, instructions = dropped + more, os.path.commonprefix([instructions, others])
    return Tasks(train, lessons, held_out, identity, dropped, instructions)


def _of_rows(rows: Sequence[Example]) -> str:
    return _sha256(json.dumps([row.to_dict() for row in rows], sort_keys=True))


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
