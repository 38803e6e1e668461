"""Which rows run where: the host's side of continuous batching."""

from collections.abc import Iterator, Sequence

import numpy as np

from srrl_jax.errors import InputError
from srrl_jax.sampling.engine import Admission
from srrl_jax.sampling.shapes import RowLengths, Shapes

Batch = list[list[int]]  # rows, by index, that are prefilled together on each shard of the mesh


def sort_rows(rows: Sequence[RowLengths], shapes: Shapes) -> list[int]:
    """Rows by index, longest first.

    Raises:
      InputError: an empty prefix, no branch, or more than the shapes hold; names the row.
    """
    for index, row in enumerate(rows):
        if row.prefix < 1 or not row.branches:
            raise InputError(f"row {index}: needs at least one prefix token and one branch")
        if not shapes.hold(row):
            raise InputError(
                f"row {index}: {row.prefix} prefix tokens and {len(row.branches)} branches of up to "
                f"{max(row.branches)} given tokens, {row.tokens} in all, are over what was planned: "
                f"{shapes.row} in all, {shapes.given} of a prefix with one branch, {shapes.fan_out} branches"
                "; plan with the longest rows, or shorten the input"
            )
    return sorted(range(len(rows)), key=lambda index: rows[index].tokens, reverse=True)


def batches(rows: Sequence[RowLengths], order: Sequence[int], shapes: Shapes, shards: int) -> Iterator[Batch]:
    """All rows, where nothing runs on after them."""
    waiting = list(order)
    while waiting:
        batch = fill(rows, waiting, shapes, [(len(rows), len(rows) * shapes.fan_out)] * shards)
        waiting = without(waiting, batch)
        yield batch


def fill(
    rows: Sequence[RowLengths], waiting: Sequence[int], shapes: Shapes, free: Sequence[tuple[int, int]]
) -> Batch:
    """A pack for each shard: of the rows that wait, each in turn that still fits somewhere.

    Args:
      free: the rows and the slots that each shard has room for.
    """
    batch: Batch = [[] for _ in free]
    tokens = [shapes.pack] * len(free)
    places, slots = ([each[i] for each in free] for i in (0, 1))
    places = [min(count, shapes.packed) for count in places]
    for row in waiting:
        if not any(map(min, places, slots)):
            break
        need = len(rows[row].branches)
        fits = [
            shard
            for shard in range(len(free))
            if places[shard] and slots[shard] >= need and tokens[shard] >= rows[row].tokens
        ]
        if fits:
            shard = max(fits, key=slots.__getitem__)
            batch[shard].append(row)
            tokens[shard] -= rows[row].tokens
            places[shard] -= 1
            slots[shard] -= need
    return batch


def without(waiting: Sequence[int], batch: Batch) -> list[int]:
    """Those that do not enter."""
    entered = {row for shard in batch for row in shard}
    return [row for row in waiting if row not in entered]


class Scheduler:
    """Waiting rows, rows in the cache, and the slots of their branches.

    A row enters with all its branches when there are slots for them. Its slots are free again one by one, its
    place in the cache when all have finished. Everything is counted by shard of the mesh, so that a branch
    runs where its prefix lies.

    Args:
      rows: lengths of each row.
      order: what `sort_rows` made of them.
      shards: pieces that rows are cut into.
    """

    def __init__(self, rows: Sequence[RowLengths], order: Sequence[int], shapes: Shapes, shards: int = 1):
        self.rows, self.waiting, self.shapes = rows, list(order), shapes
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

    def early_exit_threshold(self) -> int:
        """Number of running branches in each shard at or below which a decode call ends early.

        While rows wait, that is where a quarter of the slots is free, which the next rows could have.
        """
        if not self.waiting:
            return 0
        shards, size = self.running.shape
        _, slots = self._worth()
        most = min(size * 3 // 4, size - -(-slots // shards))
        return max(0, min(most, int(self.running.sum(1).max()) - 1))

    def _worth(self) -> tuple[int, int]:
        """Tokens worth a prefill beside rows that run, and the slots that they need: of the first that wait
        as many as fill most of a pack, or as are a quarter of those that can run."""
        tokens = slots = 0
        for count, row in enumerate(self.waiting, 1):
            tokens += self.rows[row].tokens
            slots += len(self.rows[row].branches)
            if tokens >= 0.75 * self.shapes.pack * len(self.row) or 4 * count >= self.shapes.running:
                break
        return tokens, slots

    def next_batch(self) -> Batch | None:
        """The rows to enter now; None where they have to wait until more has finished."""
        free = zip((self.row < 0).sum(1).tolist(), (~self.running).sum(1).tolist(), strict=True)
        batch = fill(self.rows, self.waiting, self.shapes, list(free))
        tokens = sum(self.rows[row].tokens for shard in batch for row in shard)
        if tokens == 0 or (self.running.any() and tokens < self._worth()[0]):
            return None
        self.waiting = without(self.waiting, batch)
        return batch

    def admit(self, batch: Batch) -> Admission:
        """Gives the rows of a batch their places."""
        shape = self.row.shape
        rows, branches = np.full(shape, -1, np.int32), np.full(self.running.shape, -1, np.int32)
        places = np.full((shape[0], self.shapes.packed), -1, np.int32)
        for shard, entering in enumerate(batch):
            for index, row in enumerate(entering):
                place = int(np.flatnonzero(self.row[shard] < 0)[0])
                count = len(self.rows[row].branches)
                slots = np.flatnonzero(~self.running[shard])[:count]
                self.row[shard, place] = row
                self.branch[shard, slots] = [(place, b) for b in range(count)]
                rows[shard, place], places[shard, index] = index, place
                branches[shard, slots] = index * self.shapes.fan_out + np.arange(count)
        grid = np.full((shape[0], shape[1] * self.shapes.fan_out), -1, np.int32)
        cells = np.maximum(self.branch[..., 0] * self.shapes.fan_out + self.branch[..., 1], 0)
        for shard, slots in enumerate(self.running):
            grid[shard, cells[shard, slots]] = np.flatnonzero(slots)
        return Admission(places, rows, branches, grid, cells.astype(np.int32))

    def finish(self, alive: np.ndarray) -> None:
        """After tokens were drawn: what is not alive, bool [S], leaves."""
        self.branch[~alive.reshape(self.running.shape)] = -1
        for shard, row in enumerate(self.row):
            row[~np.isin(np.arange(row.size), self.branch[shard, :, 0])] = -1
