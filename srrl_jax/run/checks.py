"""What must hold before anything expensive starts, what may change when a run resumes, and its programs."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import yaml
from etils import epath

from srrl_jax import storage
from srrl_jax.actor import Actor
from srrl_jax.errors import InputError
from srrl_jax.grading.teacher import DECIDES, TeacherConfig
from srrl_jax.parallel import gather
from srrl_jax.programs import Program
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.telemetry.trackers import find_tracker
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.learner import Learner
from srrl_jax.training.settings import merged
from srrl_jax.training.update import TrainState

# Keys that may differ when a run resumes: they do not change what a step computes (`mesh`: only by
# rounding), but how long the run is, what is kept, and how often it is measured.
_SPEED = [f"teacher.{field.name}" for field in dataclasses.fields(TeacherConfig) if field.name not in DECIDES]
NOTHING: Mapping[str, str] = MappingProxyType({})
_MAY_CHANGE = (
    "run_dir",
    "steps",
    "checkpoint",
    "eval",
    "mesh",
    "profile",
    "reference",
    "trackers",
    *_SPEED,
)


def check_run(config: TrainConfig) -> list[str]:
    """Checks the recipe and compares it with that of the run in its directory, if there is one.

    Nothing is written.

    Returns:
      The changes that are accepted, e.g. "steps was 10, now 20"; none where no checkpoint is.
    Raises:
      InputError: a value is out of its bounds; the directory cannot be written, or it holds a run of
        another recipe (the message shows the keys that differ), one that is longer or one that has lost its
        checkpoints; or a tracker's library is missing.
    """
    TrainConfig.from_dict(config.to_dict())  # it may have been made in Python, where nothing checks bounds
    run_dir = storage.locate(config.run_dir)
    if config.profiled and storage.is_remote(run_dir):
        raise InputError("profile: JAX writes traces to disks alone; give a run_dir on one, or leave it out")
    if not storage.is_remote(run_dir):
        existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise InputError(f"run_dir: cannot write {run_dir}: {existing} is not a writable directory")
    for name in config.trackers:
        find_tracker(name)
    old, _, done = _begun(config)
    if not done:
        _check_logs(config, run_dir)
        return []
    differences = list(_differences(old, config.to_dict()))
    refused = [text for key, text in differences if not {key, key.split(".")[0]} & {*_MAY_CHANGE}]
    if refused:
        raise InputError(
            f"{run_dir} holds a run of another recipe: {'; '.join(refused)}. "
            "Resume with the same values, or give another run_dir"
        )
    if config.steps < done:
        raise InputError(f"steps: {run_dir} has done {done} already, more than {config.steps}")
    return [text for key, text in differences if key != "run_dir"]


def _check_logs(config: TrainConfig, run_dir: epath.Path) -> None:
    """Refuses to begin anew, which empties the logs, where checkpoints have been and are no more."""
    path = run_dir / "config.yaml"
    if path.exists() and storage.parts(run_dir / "metrics.jsonl"):
        every = storage.read_yaml(path).get("checkpoint", {}).get("every", config.checkpoint.every)
        last = max((row["step"] for row in iter_jsonl(run_dir / "metrics.jsonl")), default=0)
        if last > 2 * every:  # the second is not begun before the first is complete
            raise InputError(
                f"{run_dir}: has logs of {last} steps, but no checkpoint to go on from, and to begin anew "
                "would delete them. Put the checkpoints back, or give another run_dir"
            )


def check_identity(config: TrainConfig, identity: Mapping[str, str]) -> list[str]:
    """Compares what the results depend on beside the recipe with what the run in its directory began with.

    Args:
      identity: a hash of each, by the names of `Depends`; what an older run lacks is not compared.
    Returns:
      A text for each change that `checkpoint.accept_changes` accepts.
    Raises:
      InputError: others; names them all.
    """
    known = _begun(config)[1]
    changed = [name for name, value in identity.items() if known.get(name, value) != value]
    refused = [name for name in changed if name not in config.checkpoint.accept_changes]
    if refused:
        raise InputError(
            f"{config.run_dir}: its run began with other {', '.join(refused)} (hashes are in config.yaml). "
            "Resume with what they were, give another run_dir, or go on all the same with "
            f"checkpoint.accept_changes=[{','.join(changed)}]"
        )
    return [f"{name} changed, by checkpoint.accept_changes" for name in changed]


def _begun(config: TrainConfig) -> tuple[dict, dict, int]:
    """Recipe and identity of the run in the recipe's directory, and its last checkpoint; 0 before the first.

    A key that the run is older than has its default.
    """
    run_dir = storage.locate(config.run_dir)
    path, folder = run_dir / "config.yaml", run_dir / "checkpoints"
    done = [int(step.name) for step in folder.iterdir() if step.name.isdigit()] if folder.is_dir() else []
    if not (path.exists() and done):
        return {}, {}, 0
    try:
        old = storage.read_yaml(path)
        identity = old.pop("identity", {})
        # Over the resolved recipe lies what was written, with keys that there are no more.
        return merged(TrainConfig.from_dict(old, where=str(path)).to_dict(), old), identity, max(done)
    except InputError as error:
        raise InputError(f"{error}. Mend what the run wrote there, or give another run_dir") from None


def write_config(config: TrainConfig, identity: Mapping[str, str] = NOTHING) -> None:
    """Makes the run directory with the resolved config; a kill leaves the old one or the new one.

    Raises:
      InputError: the directory cannot be written.
    """
    path = storage.locate(config.run_dir) / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = config.to_dict() | ({"identity": dict(identity)} if identity else {})
        storage.replace(path, [yaml.safe_dump(written, sort_keys=False).encode()])
    except OSError as error:
        raise InputError(f"run_dir: cannot write {path}: {error.strerror}") from None


def run_programs(config: TrainConfig, actor: Actor, learner: Learner, state: TrainState) -> list[Program]:
    """All large programs of a run, in the order of a step; `state` may be shapes."""
    grades = config.judge in ("policy", "frozen") or config.data.eval is not None
    acting = actor.programs(learner.policy_shapes(state.params), grades, replaced=config.frozen_grades)
    found: dict[tuple, Program] = {}
    for program in [*acting, *learner.programs(state)]:  # both roles move weights by one program
        shapes, structure = jax.tree.flatten((program.args, program.static))
        found.setdefault((program.function, structure, *shapes), program)
    return list(found.values())


def check_processes(config: TrainConfig, identity: Mapping[str, str]) -> None:
    """Compares what the processes of a run were given; they decide alike only where that is the same.

    Raises:
      InputError: they have other recipes, rows or tokenizers, or another JAX; names two processes.
    """
    first, *others = gather({"recipe": config.to_dict(), "JAX": jax.__version__} | identity)
    for number, other in enumerate(others, start=1):
        for what, value in first.items():
            if other.get(what) != value:
                raise InputError(
                    f"process {number} has another {what} than process 0; give all of them the same command, "
                    "files and packages"
                )


def _differences(old: dict, new: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, what it was and is) of everything that differs, in the order of the recipe."""
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield path + key, f"{path}{key} was {before!r}, now {after!r}"
