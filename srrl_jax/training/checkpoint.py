"""Checkpoints of a run: policy, optimizer, and where the run stands."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from srrl_jax import storage
from srrl_jax.training.config import CheckpointConfig


class TrainState(NamedTuple):
    """What an update changes: the policy's `nnx.state` and the optimizer's state."""

    params: Any
    opt_state: Any


class Checkpoints:
    """Orbax checkpoints under `run_dir/checkpoints`, written in the background.

    Beside the arrays each holds `position`: the step, the seed that all random keys are folded
    from, and the first row index of the next step.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        self._manager = ocp.CheckpointManager(storage.locate(run_dir) / "checkpoints", options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()  # waits for what is being written

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, position: dict[str, int]) -> None:
        """Starts to write; returns when the arrays may be donated again."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), position=ocp.args.JsonSave(position)
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step` in the shapes and placement of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return TrainState(**self._manager.restore(step, args=args)["state"])

    def restore_params(self, step: int, like: Any) -> Any:
        """The policy's weights alone, in the shapes and placement of `like`."""
        target = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def position(self, step: int) -> dict[str, int]:
        """Where the run stood at `step`."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["position"]
