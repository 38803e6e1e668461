"""Who runs where: the host's side of continuous batching."""

from collections import deque
from itertools import islice, takewhile

import numpy as np

from srrl_jax.sampling.buckets import Buckets, Wave, fit, sort_rows
from srrl_jax.sampling.decode import Places

CHUNK = 32  # tokens between two looks of the host: the price of one look, spread


class Schedule:
    """Waiting rows, resident rows and the slots of their branches.

    A row enters with all its branches when there are slots for them, its slots are free again one by one,
    its place when all have finished. Everything is counted by shard of the mesh, so that a branch runs
    where its prefix lies.

    Args:
      prefix_lengths, branch_lengths: of each row, and of each of its branches' given tokens.
      buckets: sizes that may be compiled. The largest of `rows` times the fan-out are the slots.
      new_tokens: most tokens of a completion.
      shards: pieces that rows are cut into.
    Raises:
      InputError: a row that the table does not hold.
    """

    def __init__(
        self,
        prefix_lengths: list[int],
        branch_lengths: list[list[int]],
        buckets: Buckets,
        new_tokens: int,
        shards: int = 1,
    ):
        self.waiting = deque(sort_rows(prefix_lengths, branch_lengths, buckets))
        self.prefix_lengths, self.branch_lengths, self.buckets = prefix_lengths, branch_lengths, buckets
        self.chunk = min(CHUNK, new_tokens)
        self.widths = widths(buckets.branch[-1] + new_tokens, self.chunk)
        together = fit(min(len(self.waiting), buckets.rows[-1]), buckets.rows, "wave")
        self.cells = max((sizes[1] for _, sizes in self.waiting), default=1)
        slots = together * self.cells
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
        """Branches still running at which a chunk ends early, because a quarter of the slots is free then and
        the next rows could have them.
        """
        if not self.waiting:
            return 0
        need = sum(len(self.branch_lengths[row]) for row, _ in islice(self.waiting, self.buckets.rows[0]))
        size = self.running.size
        return max(0, min(size * 3 // 4, size - need, int(self.running.sum()) - 1))

    def next_wave(self) -> Wave | None:
        """The rows to enter now, of one size; None where they have to wait."""
        if not self.waiting:
            return None
        sizes = self.waiting[0][1]
        group = [row for row, _ in takewhile(lambda entry: entry[1] == sizes, self.waiting)]
        for size in reversed(self.buckets.rows):
            indices = self._seats(group, size)
            taken = sum(row >= 0 for row in indices)
            if taken == size:
                break
        if taken < size and (taken < len(group) and self.running.any() or not taken):
            return None
        for _ in range(taken):
            self.waiting.popleft()
        return Wave(tuple(indices), *sizes)

    def _seats(self, group: list[int], size: int) -> list[int]:
        """The first rows of `group` on `size` seats, cut into shards; -1 on those that stay empty."""
        free_slots = (~self.running).sum(1)
        free_rows = np.minimum((self.row < 0).sum(1), size // len(self.row))
        seats = [[] for _ in self.row]
        for row in group:
            need = len(self.branch_lengths[row])
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
            count = len(self.branch_lengths[row])
            slots = np.flatnonzero(~self.running[shard])[:count]
            self.row[shard, place] = row
            self.branch[shard, slots] = [(place, b) for b in range(count)]
            self.length[shard, slots] = self.branch_lengths[row]
            rows[shard, place] = seat
            branches[shard, slots] = seat * wave.fan_out + np.arange(count)
        grid = np.zeros((shards, self.row.shape[1] * self.cells), int)
        cells = np.maximum(self.branch[..., 0] * self.cells + self.branch[..., 1], 0)
        for shard, slots in enumerate(self.running):
            grid[shard, cells[shard, slots]] = np.flatnonzero(slots)
        return Places(*(x.astype(np.int32) for x in (rows, branches, grid, cells)))

    def sizes(self, wave: Wave | None = None) -> tuple[int, int, int]:
        """Prefix tokens and own columns that the caches need, and how far left own tokens move.

        For what runs and is to enter; then for a chunk of tokens.
        """
        entering = [row for row in wave.indices if row >= 0] if wave else []
        prefixes = [self.prefix_lengths[row] for row in (*self.row[self.row >= 0], *entering)]
        prefix = fit(max(prefixes), self.buckets.prefix, "prefix")
        longest = max([0, *self.length[self.running], *(max(self.branch_lengths[row]) for row in entering)])
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
    """Sizes of the cache of own tokens: doubling, up to `longest` and a chunk."""
    top, sizes = longest + chunk, []
    size = 2 * chunk
    while size < top:
        sizes.append(size)
        size *= 2
    return (*sizes, top)
