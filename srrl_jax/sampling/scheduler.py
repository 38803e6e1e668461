"""Which rows run where: the host's side of continuous batching."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from srrl_jax.errors import InputError
from srrl_jax.sampling.engine import Admission
from srrl_jax.sampling.shapes import PrefillShape, RowLengths, Shapes


class Batch(NamedTuple):
    """Rows (by index, -1 is padding) that are prefilled together."""

    shape: PrefillShape
    rows: tuple[int, ...]


def sort_rows(rows: Sequence[RowLengths], shapes: Shapes, new_tokens: int) -> list[tuple[int, int]]:
    """(prefill shape, row), both by index, longest first.

    Raises:
      InputError: an empty prefix, no branch, or more than the shapes hold; names the row.
    """
    found = []
    for index, row in enumerate(rows):
        if row.prefix < 1 or not row.branches:
            raise InputError(f"row {index}: needs at least one prefix token and one branch")
        shape = shapes.smallest(row, new_tokens)
        if shape is None:
            largest = shapes.prefill[-1]
            raise InputError(
                f"row {index}: {row.prefix} prefix tokens and {len(row.branches)} branches of up to "
                f"{max(row.branches)} given tokens are over what was planned: {largest.prefix} and "
                f"{shapes.fan_out} of {shapes.own - new_tokens}, {largest.lanes * largest.lane} in all; "
                "plan with the longest rows, or shorten the input"
            )
        found.append((shape, index))
    return sorted(found, key=lambda each: (each[0], rows[each[1]].prefix), reverse=True)


def batches(order: Sequence[tuple[int, int]], shapes: Shapes) -> Iterator[Batch]:
    """All rows, where nothing runs on after them."""
    waiting = deque(order)
    while waiting:
        shape = shapes.prefill[waiting[0][0]]
        rows = list(islice(_that_fit(waiting, shapes), shape.rows))
        for _ in rows:
            waiting.popleft()
        yield Batch(shape, (*rows, *[-1] * (shape.rows - len(rows))))


def _that_fit(waiting: Sequence[tuple[int, int]], shapes: Shapes) -> Iterator[int]:
    """The first rows that wait, as long as they fit the prefill shape of the very first."""
    largest = shapes.prefill[waiting[0][0]]
    for index, row in waiting:
        shape = shapes.prefill[index]
        if shape.prefix > largest.prefix or shape.lanes > largest.lanes:
            return
        yield row


class Scheduler:
    """Waiting rows, rows in the prefix cache, and the slots of their branches.

    A row enters with all its branches when there are slots for them. Its slots are free again one by one, its
    place in the cache when all have finished. Everything is counted by shard of the mesh, so that a branch
    runs where its prefix lies.

    Args:
      rows: lengths of each row.
      order: what `sort_rows` made of them.
      shards: pieces that rows are cut into.
    """

    def __init__(
        self, rows: Sequence[RowLengths], order: Sequence[tuple[int, int]], shapes: Shapes, shards: int = 1
    ):
        self.rows, self.waiting, self.shapes = rows, deque(order), shapes
        self.row = np.full((shards, shapes.rows // shards), -1)  # the row at each place of the cache
        # Of each slot the place of its branch's row, and the number of the branch.
        self.branch = np.full((shards, shapes.slots // shards, 2), -1)

    @property
    def running(self) -> np.ndarray:
        """bool [R, S / R]."""
        return self.branch[..., 0] >= 0

    def branches(self) -> list[tuple[int, int, int]]:
        """(slot, row, branch) of all that run."""
        r, s = np.nonzero(self.running)
        place, number = self.branch[r, s].T
        slots = r * self.branch.shape[1] + s
        return list(zip(slots.tolist(), self.row[r, place].tolist(), number.tolist(), strict=True))

    def enough(self) -> int:
        """Branches still running in each shard at which decoding ends early: while rows wait, because a
        quarter of the slots is free then and the next rows could have them."""
        if not self.waiting:
            return 0
        shards, size = self.running.shape
        need = -(-self._least() // shards) * len(self.rows[self.waiting[0][1]].branches)
        most = min(size * 3 // 4, size - need)
        return max(0, min(most, int(self.running.sum(1).max()) - 1))

    def next_batch(self) -> Batch | None:
        """The rows to enter now; None where they have to wait until more has finished."""
        if not self.waiting:
            return None
        shape = self.shapes.prefill[self.waiting[0][0]]
        taken = self._seats(shape.rows)
        count = sum(map(len, taken))
        if count == 0 or (count < self._least() and self.running.any()):
            return None
        for _ in range(count):
            self.waiting.popleft()
        each = shape.rows // len(taken)
        return Batch(shape, tuple(row for rows in taken for row in rows + [-1] * (each - len(rows))))

    def _least(self) -> int:
        """Rows worth a prefill beside others that run: a quarter of those that could, if so many wait."""
        rows = self.shapes.running
        fitting = sum(1 for _ in islice(_that_fit(self.waiting, self.shapes), rows))
        return min(self.shapes.prefill[self.waiting[0][0]].rows, fitting, -(-rows // 4))

    def _seats(self, size: int) -> list[list[int]]:
        """The first rows that wait, `size` of them if there is room, by shard."""
        free_slots = (~self.running).sum(1)
        free_rows = np.minimum((self.row < 0).sum(1), size // len(self.row))
        seats = [[] for _ in self.row]
        for row in _that_fit(self.waiting, self.shapes):
            need = len(self.rows[row].branches)
            shard = int(np.argmax(np.where(free_rows > 0, free_slots, -1)))
            if free_rows[shard] == 0 or free_slots[shard] < need:
                break
            seats[shard].append(row)
            free_slots[shard] -= need
            free_rows[shard] -= 1
        return seats

    def admit(self, batch: Batch) -> Admission:
        """Gives the rows of a batch their places."""
        each = len(batch.rows) // len(self.row)
        rows, branches = np.full(self.row.shape, -1, np.int32), np.full(self.running.shape, -1, np.int32)
        for seat, row in enumerate(batch.rows):
            if row < 0:
                continue
            shard, seat = divmod(seat, each)
            place = int(np.flatnonzero(self.row[shard] < 0)[0])
            count = len(self.rows[row].branches)
            slots = np.flatnonzero(~self.running[shard])[:count]
            self.row[shard, place] = row
            self.branch[shard, slots] = [(place, b) for b in range(count)]
            rows[shard, place] = seat
            branches[shard, slots] = seat * self.shapes.fan_out + np.arange(count)
        grid = np.full((len(self.row), self.row.shape[1] * self.shapes.fan_out), -1, np.int32)
        cells = np.maximum(self.branch[..., 0] * self.shapes.fan_out + self.branch[..., 1], 0)
        for shard, slots in enumerate(self.running):
            grid[shard, cells[shard, slots]] = np.flatnonzero(slots)
        return Admission(rows, branches, grid, cells.astype(np.int32))

    def finish(self, alive: np.ndarray) -> None:
        """After tokens were drawn: what is not alive, bool [S], leaves."""
        self.branch[~alive.reshape(self.running.shape)] = -1
        for shard, row in enumerate(self.row):
            row[~np.isin(np.arange(row.size), self.branch[shard, :, 0])] = -1
