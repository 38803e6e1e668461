"""Who runs where: the host's side of continuous batching."""

from collections import deque
from itertools import islice

import numpy as np

from srrl_jax.sampling.buckets import Buckets, Lengths, Wave, choose_wave, fit, sort_rows
from srrl_jax.sampling.decode import Kept, Places

CHUNK = 32  # tokens between two looks of the host: the price of one look, spread


class Schedule:
    """Waiting rows, resident rows and the slots of their branches.

    A row enters with all its branches when there are slots for them, its slots are free again one by one,
    its place when all have finished. Everything is counted by shard of the mesh, so that a branch runs
    where its prefix lies.

    Args:
      lengths: of each row's prefix and branches.
      buckets: sizes that may be compiled. The largest of `rows` times the fan-out are the slots.
      new_tokens: most tokens of a completion.
      shards: pieces that rows are cut into.
    Raises:
      InputError: a row that the table does not hold.
    """

    def __init__(
        self,
        lengths: Lengths,
        buckets: Buckets,
        new_tokens: int,
        shards: int = 1,
    ):
        self.waiting = deque(sort_rows(lengths, buckets))
        self.lengths, self.buckets = lengths, buckets
        self.chunk = min(CHUNK, new_tokens)
        self.widths = widths(buckets.branch[-1] + new_tokens, self.chunk)
        together = fit(min(len(self.waiting), buckets.rows[-1]), buckets.rows, "wave")
        self.cells = max((sizes[1] for _, sizes in self.waiting), default=1)
        slots = together * self.cells
        self.slot_sizes = [size * self.cells // shards for size in buckets.rows if size <= together]
        # Rows stay while one of their branches runs: with more rows than that, no slot waits for a place.
        rows = together * (1 if len(self.waiting) <= together else 2)
        self.row = np.full((shards, rows // shards), -1)  # resident row at each place
        self.branch = np.full((shards, slots // shards, 2), -1)  # place of its row, and number, in each slot
        self.length = np.zeros((shards, slots // shards), int)  # own tokens in the cache
        self.prefix = self.width = self.end = 0

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
        """Branches still running in each shard at which a chunk ends early: while rows wait, because a
        quarter of the slots is free then and the next rows could have them; later, because fewer slots do.
        """
        shards, size = self.length.shape
        if self.waiting:
            need = sum(
                len(self.lengths.branches[row]) for row, _ in islice(self.waiting, self.buckets.rows[0])
            )
            most = min(size * 3 // 4, size - -(-need // shards))
        else:
            most = max((slots for slots in self.slot_sizes if slots < size), default=0)
        return max(0, min(most, int(self.running.sum(1).max()) - 1))

    def compaction(self) -> Kept | None:
        """The slots and rows to go on with, where nobody waits and fewer slots would do."""
        shards, size = self.length.shape
        busy = int(self.running.sum(1).max())
        slots = min(slots for slots in self.slot_sizes if slots >= busy)
        if self.waiting or not busy or slots == size:
            return None
        rows = min(slots, self.row.shape[1])
        kept_rows = np.argsort(self.row < 0, axis=1, kind="stable")[:, :rows]
        kept_slots = np.argsort(~self.running, axis=1, kind="stable")[:, :slots]
        self.branch = np.take_along_axis(self.branch, kept_slots[..., None], axis=1)
        for shard, old in enumerate(kept_rows):
            running = self.running[shard]
            where = self.branch[shard, running, :1]
            self.branch[shard, running, 0] = (where == old).argmax(1)
        self.row = np.take_along_axis(self.row, kept_rows, axis=1)
        self.length = np.take_along_axis(self.length, kept_slots, axis=1)
        return Kept(kept_rows.astype(np.int32), kept_slots.astype(np.int32), *self._grid())

    def next_wave(self) -> Wave | None:
        """The rows to enter now; None where they have to wait."""
        found = choose_wave(self.waiting, self.lengths, self.buckets.rows, self._seats_worth)
        if found is None:
            return None
        wave, taken = found
        for _ in range(taken):
            self.waiting.popleft()
        return wave

    def _seats_worth(self, rows: list[int], size: int) -> list[int]:
        """As `_seats`, but none where more rows could fill them when more has finished."""
        seats = self._seats(rows, size)
        taken = sum(row >= 0 for row in seats)
        return [] if taken < min(size, len(self.waiting)) and self.running.any() else seats

    def _seats(self, rows: list[int], size: int) -> list[int]:
        """The first of the rows on `size` seats, cut into shards; -1 on those that stay empty."""
        free_slots = (~self.running).sum(1)
        free_rows = np.minimum((self.row < 0).sum(1), size // len(self.row))
        seats = [[] for _ in self.row]
        for row in rows:
            need = len(self.lengths.branches[row])
            shard = int(np.argmax(np.where(free_rows > 0, free_slots, -1)))
            if free_rows[shard] == 0 or free_slots[shard] < need:
                break
            seats[shard].append(row)
            free_slots[shard] -= need
            free_rows[shard] -= 1
        each = size // len(self.row)
        return [row for taken in seats for row in taken + [-1] * (each - len(taken))]

    def enter(self, wave: Wave) -> Places:
        """Gives the rows of a wave their places."""
        shards = len(self.row)
        each = len(wave.indices) // shards
        rows, branches = np.full(self.row.shape, -1), np.full(self.length.shape, -1)
        for seat, row in enumerate(wave.indices):
            if row < 0:
                continue
            shard, seat = divmod(seat, each)
            place = int(np.flatnonzero(self.row[shard] < 0)[0])
            count = len(self.lengths.branches[row])
            slots = np.flatnonzero(~self.running[shard])[:count]
            self.row[shard, place] = row
            self.branch[shard, slots] = [(place, b) for b in range(count)]
            self.length[shard, slots] = self.lengths.branches[row]
            rows[shard, place] = seat
            branches[shard, slots] = seat * wave.fan_out + np.arange(count)
        return Places(rows.astype(np.int32), branches.astype(np.int32), *self._grid())

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The slot of each cell and the cell of each slot, as `Rows` and `Slots` have them."""
        grid = np.zeros((len(self.row), self.row.shape[1] * self.cells), np.int32)
        cells = np.maximum(self.branch[..., 0] * self.cells + self.branch[..., 1], 0).astype(np.int32)
        for shard, slots in enumerate(self.running):
            grid[shard, cells[shard, slots]] = np.flatnonzero(slots)
        return grid, cells

    def sizes(self, wave: Wave | None = None) -> tuple[int, int, int]:
        """Prefix tokens and own columns that the caches need, and how far left own tokens move.

        For what runs and is to enter; then for a chunk of tokens.
        """
        entering = [row for row in wave.indices if row >= 0] if wave else []
        prefixes = [self.lengths.prefix[row] for row in (*self.row[self.row >= 0], *entering)]
        prefix = fit(max(prefixes), self.buckets.prefix, "prefix")
        longest = max([0, *self.length[self.running], *(max(self.lengths.branches[row]) for row in entering)])
        width = fit(int(longest) + self.chunk, self.widths, "cache")
        shift = 0
        if width != self.width or longest > self.end or self.end + self.chunk > width:
            shift = self.end - int(longest)
        return prefix, width, shift

    def resized(self, prefix: int, width: int, shift: int) -> None:
        """The caches are so now."""
        self.prefix, self.width, self.end = prefix, width, self.end - shift

    def advance(self, counts: np.ndarray, alive: np.ndarray) -> None:
        """After a chunk: `counts` int [S] tokens drawn, `alive` bool [S]. What has finished leaves."""
        self.length += counts.reshape(self.length.shape)
        self.end += int(counts.max())
        self.branch[~alive.reshape(self.length.shape)] = -1
        for shard, row in enumerate(self.row):
            live = np.isin(np.arange(row.size), self.branch[shard, :, 0])
            row[~live] = -1


def widths(longest: int, chunk: int) -> tuple[int, ...]:
    """Sizes of the cache of own tokens: 2, 3, 4, 6, 8, 12, ... chunks, up to `longest` and a chunk."""
    top, sizes, size = longest + chunk, [], 2 * chunk
    while size < top:
        sizes += [size, size * 3 // 2]
        size *= 2
    return (*(size for size in sizes if size < top), top)
