"""What a run needs before anything expensive starts: its directory and its rows."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import jax
import yaml

from srrl_jax import storage
from srrl_jax.data import check_disjoint, load_examples, select, subtract
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader
from srrl_jax.grading.teacher import DECIDES, TeacherConfig
from srrl_jax.models.tokenizer import Tokenizer
from srrl_jax.parallel import gather
from srrl_jax.rubrics import Example
from srrl_jax.telemetry.trackers import find_tracker
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task, encode_tasks
from srrl_jax.training.lessons import load_lessons

# Keys that may differ when a run resumes: they do not change what a step computes (`mesh`: only by
# rounding), but how long the run is, what is kept, and how often it is measured.
_SPEED = [f"teacher.{field.name}" for field in dataclasses.fields(TeacherConfig) if field.name not in DECIDES]
NOTHING: Mapping[str, str] = MappingProxyType({})
_MAY_CHANGE = ("run_dir", "steps", "checkpoint", "eval", "mesh", "profile", "reference", "trackers", *_SPEED)


def check_run(config: TrainConfig, identity: Mapping[str, str] = NOTHING) -> list[str]:
    """Compares the recipe with that of the run in its directory, if there is one; writes nothing.

    Args:
      identity: hashes of what is not in the recipe, by name; they have to be those of the run.
    Returns:
      The changes that are accepted, e.g. "steps was 10, now 20"; none where no checkpoint is.
    Raises:
      InputError: the directory cannot be written, or it holds a run of another recipe (the message
        shows the keys that differ) or one that is longer; or a tracker's library is missing.
    """
    run_dir = storage.locate(config.run_dir)
    if config.profiled and storage.is_remote(run_dir):
        raise InputError("profile: JAX writes traces to disks alone; give a run_dir on one, or leave it out")
    if not storage.is_remote(run_dir):
        existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise InputError(f"run_dir: cannot write {run_dir}: {existing} is not a writable directory")
    for name in config.trackers:
        find_tracker(name)
    path = run_dir / "config.yaml"
    folder = run_dir / "checkpoints"
    done = [int(step.name) for step in folder.iterdir() if step.name.isdigit()] if folder.is_dir() else []
    if not (path.exists() and done):
        return []
    differences = list(_differences(yaml.safe_load(path.read_text()), _written(config, identity)))
    refused = [text for key, text in differences if not {key, key.split(".")[0]} & {*_MAY_CHANGE}]
    if refused:
        raise InputError(
            f"{run_dir} holds a run of another recipe: {'; '.join(refused)}. "
            "Resume with the same values, or give another run_dir"
        )
    if config.steps < max(done):
        raise InputError(f"steps: {run_dir} has done {max(done)} already, more than {config.steps}")
    return [text for key, text in differences if key != "run_dir"]


def write_config(config: TrainConfig, identity: Mapping[str, str] = NOTHING) -> None:
    """Makes the run directory with the resolved config; a kill leaves the old one or the new one.

    Raises:
      InputError: the directory cannot be written.
    """
    path = storage.locate(config.run_dir) / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.replace(path, [yaml.safe_dump(_written(config, identity), sort_keys=False).encode()])
    except OSError as error:
        raise InputError(f"run_dir: cannot write {path}: {error.strerror}") from None


def load_tasks(
    config: TrainConfig, tokenizer: Tokenizer, rows: Sequence[Example] | None = None
) -> tuple[list[Task], list[Task], list[Task]]:
    """Training rows, lessons (none without data.teacher) and held-out rows (none without data.eval).

    `rows` take the place of data.train. All are checked against the bucket table.
    """
    examples = load_examples(config.data.train, config.data.fields) if rows is None else rows
    if config.data.minus is not None:
        examples = subtract(examples, load_examples(config.data.minus, config.data.fields))
    examples = select(examples, config.data.where)
    tasks = encode_tasks(examples, config.data.train, tokenizer, config)
    lessons = []
    if config.data.teacher is not None:
        grader = Grader.at(config.grading, tokenizer)
        lessons = load_lessons(config.data.teacher, grader, config, first_row=len(tasks))
    if config.data.eval is None:
        return tasks, lessons, []
    held_out = load_examples(config.data.eval, config.data.fields)
    check_disjoint(examples, held_out)
    return tasks, lessons, encode_tasks(held_out[: config.eval.rows], config.data.eval, tokenizer, config)


def check_processes(config: TrainConfig, identity: Mapping[str, str], *tasks: list[Task]) -> None:
    """Compares what the processes of a run were given; they decide alike only where that is the same.

    Raises:
      InputError: they have other recipes, rows or tokenizers, or another JAX; names two processes.
    """
    mine = {
        "recipe": _written(config, identity),
        "JAX": jax.__version__,
        "rows or tokenizer": hashlib.sha256(repr(tasks).encode()).hexdigest(),
    }
    first, *others = gather(mine)
    for number, other in enumerate(others, start=1):
        for what, value in first.items():
            if other[what] != value:
                raise InputError(
                    f"process {number} has another {what} than process 0; give all of them the same command, "
                    "files and packages"
                )


def _written(config: TrainConfig, identity: Mapping[str, str]) -> dict:
    return config.to_dict() | ({"identity": dict(identity)} if identity else {})


def _differences(old: dict, new: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, what it was and is) of everything that differs, in the order of the recipe."""
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield path + key, f"{path}{key} was {before!r}, now {after!r}"
