"""Metrics and samples of a run sent on to TensorBoard, W&B, MLflow, Trackio, or a tracker of one's own.

Each is written by its own library, an extra of this package, and set up as that library is (environment
variables, login). None of them is needed for a run or its report.
"""

import contextlib
import io
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol, Self

import yaml
from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.imports import import_object

PROJECT = "srrl"


class Tracker(Protocol):
    """What shows a run elsewhere; a recipe names one's own as `package.module:Class`.

    Attributes:
      id: of the tracked run, as text; it is kept in the run directory.
    """

    id: str

    def __init__(self, run_dir: epath.Path, config: dict, id: str | None):
        """Opens the tracked run `id`, or a new one where that is None. `config` is the resolved recipe."""

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict]) -> None:
        """Takes a step, each at most once and in order: its finite metrics, its rows of samples.jsonl."""

    def close(self, failed: bool) -> None:
        """Ends the session of writing; with `failed` the run ended by an error or a signal."""


class TensorBoard:
    """Event files in `RUN/tensorboard`, which has no tables."""

    def __init__(self, run_dir: epath.Path, config: dict, id: str | None):
        from tensorboardX import SummaryWriter

        self.id = id or "tensorboard"
        # A file is named by the second it was opened in: a resumed run must not write over it.
        self._writer = SummaryWriter(str(run_dir / self.id), filename_suffix=f".{time.time_ns()}")
        if id is None:
            self._writer.add_text("recipe", f"```\n{yaml.safe_dump(config, sort_keys=False)}```")

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of the project WANDB_PROJECT, by default `srrl`.

    Offline its service writes blocks of 32 KiB: steps of the last one are not in its files after a SIGKILL.
    """

    def __init__(self, run_dir: epath.Path, config: dict, id: str | None):
        import wandb

        self._table = wandb.Table
        self.id = id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=self.id,
            resume="allow",
            config=config,
            allow_val_change=True,  # the number of steps of a run that goes on
            dir=None if storage.is_remote(run_dir) else str(run_dir),
            settings=wandb.Settings(console="off"),  # which would take the terminal from the progress display
        )

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict]) -> None:
        self._run.log(metrics | {"samples": _table(self._table, samples)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, by default `srrl`; a table of samples for each step."""

    def __init__(self, run_dir: epath.Path, config: dict, id: str | None):
        from mlflow import MlflowClient, entities

        self._client, self._metric = MlflowClient(), entities.Metric
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            params = [entities.Param(key, str(value)[:6000]) for key, value in _flat(config)]
            for first in range(0, len(params), 100):  # what MLflow takes at one time
                self._client.log_batch(id, params=params[first : first + 100])
        else:
            self._client.update_run(id, status="RUNNING")
        self.id = id

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict]) -> None:
        now = int(1000 * time.time())
        values = [self._metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.id, metrics=values)
        self._client.log_table(self.id, sample_table(samples), f"samples/step_{step:06d}.json")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Trackio:
    """A run of the project `srrl`, on this machine or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, run_dir: epath.Path, config: dict, id: str | None):
        import trackio

        self._table = trackio.Table
        self.id = id or f"{run_dir.name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(io.StringIO()):  # it colours what it says, terminal or not
            self._run = trackio.init(
                project=PROJECT, name=self.id, config=config, resume="allow", embed=False
            )

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict]) -> None:
        self._run.log(metrics | {"samples": _table(self._table, samples)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


def _table(kind: type, samples: Sequence[dict]) -> Any:
    """The samples as the table of a library that takes columns and rows."""
    columns = sample_table(samples)
    return kind(columns=list(columns), data=[list(row) for row in zip(*columns.values(), strict=True)])


# The class of each name, and what its library is imported as.
_KNOWN = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}


def find_tracker(name: str) -> type[Tracker]:
    """The class of a name in a recipe's `trackers`.

    Raises:
      InputError: it has none, or its library is not installed.
    """
    if name in _KNOWN:
        kind, library = _KNOWN[name]
        if find_spec(library) is None:
            raise InputError(
                f"trackers: {name} needs {library}: pip install 'srrl-jax[{name}]', or leave it out"
            )
        return kind
    if ":" not in name:
        raise InputError(
            f"trackers: {name!r} is none of {', '.join(_KNOWN)}; a class of your own is package.module:Class"
        )
    return import_object(name, "trackers")


class Trackers:
    """A context manager around the trackers of a run, which are told of each step once.

    `RUN/trackers.json` keeps, for each, the id of its run and the last step it was told of. That is written
    before the step is sent, so that a step which is computed again after a kill is not doubled.
    """

    def __init__(self, names: Sequence[str], run_dir: epath.Path, config: dict):
        self._names, self._run_dir, self._config = names, run_dir, config
        self._path = run_dir / "trackers.json"
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        if not self._names:
            return self
        self._kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        for name in self._names:
            kept = self._kept.setdefault(name, {"id": None, "step": -1})
            try:
                self._open[name] = find_tracker(name)(self._run_dir, self._config, kept["id"])
            except Exception as error:
                self.__exit__(type(error))
                raise InputError(
                    f"trackers: {name} cannot be opened: {type(error).__name__}: {error}"
                ) from error
            kept["id"] = self._open[name].id
        self._keep()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for tracker in self._open.values():
            tracker.close(failed=kind is not None)

    def write(self, step: int, metrics: Mapping[str, object], samples: Sequence[dict]) -> list[str]:
        """Sends a step to all that do not have it; returns what went wrong, which does not end the run."""
        waiting = {name: each for name, each in self._open.items() if self._kept[name]["step"] < step}
        if not waiting:
            return []
        for name in waiting:
            self._kept[name]["step"] = step
        self._keep()
        numbers = {name: float(value) for name, value in metrics.items() if value is not None}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        faults = []
        for name, tracker in waiting.items():
            try:
                tracker.write(step, numbers, samples)
            except Exception as error:
                faults.append(f"tracker {name} has not got step {step}: {type(error).__name__}: {error}")
        return faults

    def _keep(self) -> None:
        storage.replace(self._path, [json.dumps(self._kept, indent=1).encode()])


def sample_table(samples: Sequence[dict]) -> dict[str, list]:
    """Columns of a table of rows of samples.jsonl, with the conversation and the verdicts as text."""
    same = ("split", "prompt_id", "sample", "response", "reward", "advantage", "tokens", "truncated")
    columns = {name: [row[name] for row in samples] for name in same}
    columns["prompt"] = [
        "\n\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"]) for row in samples
    ]
    columns["verdicts"] = ["\n".join(map(_verdict, row["criteria"])) for row in samples]
    return columns


def _verdict(criterion: dict) -> str:
    met = {True: "met", False: "not met", None: "unscorable"}[criterion["verdict"]]
    return f"[{criterion['points']:+g}] {met}: {criterion['criterion']} ({criterion['explanation']})"


def _flat(config: dict, path: str = ""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value
