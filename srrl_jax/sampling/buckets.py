"""The declared table of shapes: what is not in it is never compiled."""

import bisect
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple, Self

from srrl_jax.errors import InputError

# A run of a program reads all weights, whatever its size: on the chips at hand that is the time of about
# so many tokens.
PRICE = 256


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes that batches are padded to, each list ascending.

    Attributes:
      prefix: tokens of a prefix, those of the trunk included.
      branch: tokens that a branch brings along (a criterion); (0,) where it starts empty (a rollout).
      fan_out: branches of a row.
      rows: rows that are prefilled together. The largest times the fan-out are the branches that run at a
        time; up to twice as many rows are kept, where more are waiting.
      trunk: tokens that all prefixes of a call may begin with alike, computed once for all of them: the
        largest size that they share (a grader's instructions); none is used where they share less.
    """

    prefix: tuple[int, ...]
    fan_out: tuple[int, ...]
    branch: tuple[int, ...] = (0,)
    rows: tuple[int, ...] = (8,)
    trunk: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            least = 0 if field.name == "branch" else 1
            if field.name == "trunk" and not sizes:
                continue
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < least:
                raise InputError(
                    f"buckets.{field.name}: must be ascending sizes from {least} on, not {sizes}"
                )

    def shared(self, prefixes: Sequence[Sequence[int]]) -> int:
        """Tokens of the trunk of these prefixes; each goes on after it."""
        if len(prefixes) < 2 or not self.trunk:
            return 0
        most = min(len(os.path.commonprefix(prefixes)), min(map(len, prefixes)) - 1, self.prefix[-1] - 1)
        return max((size for size in self.trunk if size <= most), default=0)

    def after(self, trunk: int) -> Self:
        """The table for what follows a trunk of so many tokens."""
        return dataclasses.replace(self, prefix=tuple(size - trunk for size in self.prefix if size > trunk))


def ladder(lengths: Iterable[int], least: int = 8) -> tuple[int, ...]:
    """The sizes that hold `lengths` out of 0, 8, 12, 16, 24, ... 128, 160, 192, ... 512, 576, 640, ... from
    `least` on: two to an octave, from 128 on four, from 512 on eight.

    Lengths that are not known beforehand so meet few shapes, whatever batch they come in, at the
    price of padding: a third of short ones at most, a ninth of long ones.
    """
    return tuple(sorted({_rung(length, least) for length in lengths}))


def _rung(length: int, least: int) -> int:
    size = least
    while size < length:
        octave = 1 << (size.bit_length() - 1)
        size += octave // (8 if size >= 512 else 4 if size >= 128 else 2)
    return size if length else 0


class Wave(NamedTuple):
    """Rows (by index, -1 is padding) that are prefilled together, and the sizes that they are padded to.

    `lanes` of `branch` places hold the given tokens of each row's branches, of which there are `fan_out`.
    """

    indices: tuple[int, ...]
    prefix: int
    fan_out: int
    branch: int
    lanes: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of each row's prefix and of its branches.

    Attributes:
      apart: each branch has a lane of its own, for kernels that cannot tell branches of a lane apart.
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]
    apart: bool = False

    def tokens(self, row: int) -> int:
        """Of a row in all."""
        return self.prefix[row] + sum(self.branches[row])

    def places(self, row: int, size: int) -> list[tuple[int, int]]:
        """The lane, of `size` places, and the first place in it of each of a row's branches.

        The longest first, each into the first lane with room.
        """
        lengths = self.branches[row]
        if self.apart:
            return [(lane, 0) for lane in range(len(lengths))]
        places, taken = [(0, 0)] * len(lengths), []
        for branch in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            length = lengths[branch]
            lane = next((lane for lane, used in enumerate(taken) if used + length <= size), len(taken))
            if lane == len(taken):
                taken.append(0)
            places[branch] = lane, taken[lane]
            taken[lane] += length
        return places

    def lanes(self, rows: Iterable[int], size: int, fan_out: int) -> int:
        """Enough for each of these rows, rounded up so that there are few numbers of them."""
        if size == 0:
            return 0
        most = max(1 + max(lane for lane, _ in self.places(row, size)) for row in rows)
        return fan_out if self.apart else min(fan_out, most if most < 3 else _rung(most, 2))


def fit(size: int, sizes: tuple[int, ...], what: str) -> int:
    """The smallest of `sizes` that holds `size`.

    Raises:
      InputError: none does; the message starts with `what`.
    """
    place = bisect.bisect_left(sizes, size)
    if place == len(sizes):
        raise InputError(
            f"{what} is {size} long, over the largest bucket ({sizes[-1]}); "
            "enlarge that bucket in the config or shorten the input"
        )
    return sizes[place]


def sort_rows(lengths: Lengths, buckets: Buckets) -> list[tuple[int, tuple[int, int, int]]]:
    """Rows (by index) with their sizes (prefix, fan-out, branch) of the table, longest first.

    Raises:
      InputError: an empty prefix, no branch, or something over the table; names the row.
    """
    rows = []
    for row, (prefix, branches) in enumerate(zip(lengths.prefix, lengths.branches, strict=True)):
        if prefix == 0 or not branches:
            raise InputError(f"row {row}: needs at least one prefix token and one branch")
        sizes = (
            fit(prefix, buckets.prefix, f"row {row}: prefix"),
            fit(len(branches), buckets.fan_out, f"row {row}: list of branches"),
            fit(max(branches), buckets.branch, f"row {row}: longest branch"),
        )
        rows.append((row, sizes))
    return sorted(rows, key=lambda entry: (entry[1], lengths.prefix[entry[0]]), reverse=True)


def choose_wave(
    waiting: Sequence[tuple[int, tuple[int, int, int]]],
    lengths: Lengths,
    sizes: Sequence[int],
    seat: Callable[[list[int], int], list[int]],
) -> tuple[Wave, int] | None:
    """The wave, of the first rows that wait, most of whose work is on tokens of theirs.

    Few seats suit rows of lengths far apart, where all would be padded to the longest; many share the
    price of a run. Rows of several sizes may sit together, padded to the largest of each.

    Args:
      waiting: rows with their sizes, longest first.
      sizes: numbers of seats to choose from.
      seat: puts the first of some rows on so many seats, -1 on those that stay empty.
    Returns:
      The wave and how many rows it takes; None where no row finds a seat.
    """
    best, most = None, 0.0
    for size in sizes:
        indices = seat([row for row, _ in islice(waiting, size)], size)
        rows = [row for row in indices if row >= 0]
        if not rows:
            continue
        largest = (entry[1] for entry in islice(waiting, len(rows)))
        prefix, fan_out, branch = map(max, zip(*largest, strict=True))
        wave = Wave(tuple(indices), prefix, fan_out, branch, lengths.lanes(rows, branch, fan_out))
        computed = size * (prefix + wave.lanes * branch)
        share = sum(map(lengths.tokens, rows)) / (computed + PRICE)
        if share > most:
            best, most = (wave, len(rows)), share
    return best


def plan_waves(lengths: Lengths, buckets: Buckets) -> list[Wave]:
    """All rows in waves, longest first.

    Raises:
      InputError: as `sort_rows`.
    """

    def seat(rows: list[int], size: int) -> list[int]:
        return rows + [-1] * (size - len(rows))

    waves, waiting = [], deque(sort_rows(lengths, buckets))
    while waiting:
        wave, taken = choose_wave(waiting, lengths, buckets.rows, seat)
        waves.append(wave)
        for _ in range(taken):
            waiting.popleft()
    return waves
