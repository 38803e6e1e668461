"""What can go wrong in a step without an error: updates that are not finite, a step that teaches nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from srrl_jax.errors import InputError
from srrl_jax.parallel import is_main, to_host
from srrl_jax.run.tokens import write_npz
from srrl_jax.telemetry.signs import warnings_of


def new_warnings(metrics: dict[str, float], before: dict[str, float]) -> list[str]:
    """Messages of the signs that hold in a step and did not in the step `before`: one an occurrence."""
    return list(warnings_of(metrics, but=warnings_of(before)).values())


class SkippedUpdates:
    """Counts the updates that were skipped because a loss or gradient was not finite.

    Args:
      limit: so many in a row end the run.
      total, in_a_row: counts so far, of the checkpoint that the run goes on from.
    """

    def __init__(self, run_dir: epath.Path, limit: int, total: int = 0, in_a_row: int = 0):
        self._folder = run_dir / "skipped"
        self._limit, self.total, self.in_a_row = limit, total, in_a_row

    def note(
        self, step: int, updates: Sequence[dict[str, np.ndarray]], minibatches: Sequence[Any]
    ) -> list[epath.Path]:
        """Counts a step's skipped updates, and writes the batch of each to `run_dir/skipped`; returns where.

        A file holds the fields of `UpdateBatch` as they went into the update.
        """
        written = []
        for i, (numbers, minibatch) in enumerate(zip(updates, minibatches, strict=True)):
            if not numbers["guard/skipped_updates"]:
                self.in_a_row = 0
                continue
            self.total += 1
            self.in_a_row += 1
            written.append(self._folder / f"step_{step:06d}_update_{i}.npz")
            fields = to_host(minibatch)._asdict()
            if is_main():
                write_npz(written[-1], **fields.pop("tree")._asdict(), **fields)
        return written

    def check(self) -> None:
        """Raises InputError when the last `limit` updates were all skipped."""
        if self.in_a_row >= self._limit:
            raise InputError(
                f"{self.in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(optimizer.max_skipped is {self._limit}); their batches are in {self._folder}. Likely "
                "cause: optimizer.learning_rate is too high, or the weights were not finite from the start"
            )
