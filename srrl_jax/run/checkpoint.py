"""Checkpoints of a run: policy, optimizer, and where the run stands."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.parallel import fingerprint, in_memory
from srrl_jax.programs import DoesNotFit
from srrl_jax.training.config import CheckpointConfig
from srrl_jax.training.memory import fits
from srrl_jax.training.update import TrainState


class Position(NamedTuple):
    """Where a run stands beside its arrays.

    Attributes:
      step: steps done.
      seed: that all random keys are folded from.
      row: place of the next step's first row in the endless sequence of epochs.
      skipped, skipped_in_a_row: see `srrl_jax.run.guards.SkippedUpdates`.
    """

    step: int
    seed: int
    row: int
    skipped: int = 0
    skipped_in_a_row: int = 0


class Checkpoints:
    """Orbax checkpoints under `run_dir/checkpoints`, written in the background.

    The newest `keep` stay, and the best one by `config.best`. What was being written when the process
    died is removed, at the latest before the next one is written. With `read_only` nothing on disk is
    touched.

    Raises:
      InputError: from every method that writes or waits, when the disk is full or the directory
        cannot be written; names the step and the last good checkpoint.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs errors that it also raises
        policies = [LatestN(config.keep)]
        if config.best:
            policies.append(BestN(get_metric_fn=_value, n=1, keep_checkpoints_without_metrics=False))
        self._best, self._folder = config.best, storage.locate(run_dir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=_value if config.best else None,  # without it no metric is stored
            cleanup_tmp_directories=not read_only,
            create=False,
            read_only=read_only,
        )
        with self._disk_errors():
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # closing waits for the other processes, and they may be waiting for this one
        try:
            with self._disk_errors():
                self._manager.close()  # waits for what is being written
        except InputError:
            if kind is None:  # else one error is on its way already, mostly this very one
                raise

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, position: Position, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts to write; returns when the arrays may be donated again."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            position=ocp.args.JsonSave(position._asdict() | {"fingerprint": _fingerprint(state)}),
        )
        best = {"value": metrics[self._best]} if self._best in metrics else None
        with self._disk_errors():
            self._manager.wait_until_finished()
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if not storage.is_remote(self._folder) and shutil.disk_usage(self._folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before half of it is written
            self._manager.save(position.step, args=args, metrics=best)

    def wait(self) -> None:
        """Returns when what is being written is complete."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> tuple[Position, TrainState]:
        """Position and state of `step`, the arrays in the shapes and placement of `like`.

        Raises:
          Exception: of many kinds, by what is damaged; ValueError where the arrays read well but are
            not those that were saved.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
        stored = self._manager.restore(step, args=args)
        state, position = TrainState(**stored["state"]), stored["position"]
        if position.pop("fingerprint") != _fingerprint(state):
            raise ValueError("the arrays are not those that were saved")
        return Position(**position), state

    def restore_params(self, step: int, like: Any) -> Any:
        """The policy's weights alone, in the shapes and placement of `like`."""
        target = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def restore_latest(self, like: TrainState) -> tuple[Position, TrainState, list[str]] | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        Newer ones that cannot be read are set aside, as `damaged-STEP`; the messages name them.

        Raises:
          InputError: there are checkpoints, but none can be read, or not into the memory. They stay in place.
        """
        damaged: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                with fits("weights"):
                    position, state = self.restore(step, like)
            except DoesNotFit:
                raise
            except Exception as error:  # damage shows in whatever way the readers fail
                if jax.process_count() > 1:  # maybe here alone, while the others wait for its arrays
                    raise InputError(
                        f"{self._folder / str(step)}: this checkpoint cannot be read ({_first_line(error)}). "
                        f"Rename it damaged-{step}, then run the same command to go on from the one before"
                    ) from error
                damaged[step] = error
                continue
            messages = []
            for bad, error in damaged.items():
                aside = self._folder / f"damaged-{bad}"
                while aside.exists():
                    aside = aside.with_name(aside.name + "x")
                (self._folder / str(bad)).rename(aside)
                messages.append(
                    f"the checkpoint of step {bad} cannot be read ({_first_line(error)}); set aside as "
                    f"{aside}, going on from step {step}"
                )
            if damaged:
                self._manager.reload()
            return position, state, messages
        if damaged:
            step, error = next(iter(damaged.items()))
            raise InputError(
                f"{self._folder}: no checkpoint can be read; of the newest, step {step}: "
                f"{_first_line(error)}. Is `model` still the checkpoint that the run began with? "
                "Else give another run_dir"
            ) from error
        return None

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # TensorStore raises ValueError, with the system's error number in the text.
            if not isinstance(error, OSError) and "os_error_code" not in str(error):
                raise
            names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
            good = [int(name) for name in names if name.isdigit()]
            last = f"the last good checkpoint is that of step {max(good)}" if good else "there is none yet"
            raise InputError(
                f"{self._folder}: cannot write a checkpoint ({_first_line(error)}); {last}. "
                "Make room or mend the directory, then run the same command to go on"
            ) from error


def _fingerprint(state: TrainState) -> int:
    return int(fingerprint(in_memory("device", state)))  # moments may be in the host's memory


def _value(metrics: dict[str, float]) -> float:
    return metrics["value"]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
