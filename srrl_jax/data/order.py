"""Which rows a step trains on: a pure function of the step, so a resumed run needs no state."""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def step_rows(num_rows: int, prompts_per_step: int, step: int, seed: int) -> list[int]:
    """Indices [prompts_per_step] of the rows of `step` (counted from 0), each in 0..num_rows-1.

    Every epoch is a fresh shuffle of all rows without replacement. Steps cut the endless sequence
    of epochs into equal pieces, so a step may straddle an edge and nothing is skipped. Raises
    ValueError for a negative step or seed or a count below 1.
    """
    _check(num_rows, prompts_per_step, step)
    if seed < 0:
        raise ValueError(f"seed must be 0 or above, not {seed}")
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    epochs = range(places[0] // num_rows, places[-1] // num_rows + 1)
    shuffled = {epoch: _shuffle(num_rows, epoch, seed) for epoch in epochs}
    return [int(shuffled[place // num_rows][place % num_rows]) for place in places]


def draw_ids(rows: Sequence[int]) -> list[int]:
    """A number for each row of a step to draw its completions with: of one that is there twice, as where a
    step straddles an edge, each time another."""
    seen: Counter[int] = Counter()
    ids = []
    for row in rows:
        ids.append((row + seen[row] * 2**24) % 2**32)
        seen[row] += 1
    return ids


def epochs_done(num_rows: int, prompts_per_step: int, step: int) -> float:
    """Passes over the data, in epochs, that are complete before `step` (counted from 0) starts."""
    _check(num_rows, prompts_per_step, step)
    return step * prompts_per_step / num_rows


def _shuffle(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    # The raw stream of a numpy bit generator never changes between versions; Generator.permutation
    # may, and a run resumed after an upgrade would then repeat and skip rows.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


def _check(num_rows: int, prompts_per_step: int, step: int) -> None:
    if num_rows < 1 or prompts_per_step < 1 or step < 0:
        raise ValueError(
            f"need num_rows >= 1, prompts_per_step >= 1 and step >= 0, not {num_rows}, "
            f"{prompts_per_step} and {step}"
        )
