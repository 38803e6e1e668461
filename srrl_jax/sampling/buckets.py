"""The declared table of shapes: what is not in it is never compiled."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from srrl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes that batches are padded to, each list ascending.

    Attributes:
      prefix: tokens of a prefix.
      branch: tokens that a branch brings along (a criterion); (0,) where it starts empty (a rollout).
      fan_out: branches of a row.
      rows: rows that are prefilled together. The largest times the fan-out are the branches that run at a
        time; up to twice as many rows are kept, where more are waiting.
    """

    prefix: tuple[int, ...]
    fan_out: tuple[int, ...]
    branch: tuple[int, ...] = (0,)
    rows: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            least = 0 if field.name == "branch" else 1
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < least:
                raise InputError(
                    f"buckets.{field.name}: must be ascending sizes from {least} on, not {sizes}"
                )


def ladder(lengths: Iterable[int], least: int = 8) -> tuple[int, ...]:
    """The sizes that hold `lengths` out of 0, 8, 12, 16, 24, 32, 48, 64, 96, ... from `least` on.

    Lengths that are not known beforehand so meet few shapes, whatever batch they come in, at the
    price of a third more padding at most.
    """
    return tuple(sorted({_rung(length, least) for length in lengths}))


def _rung(length: int, least: int) -> int:
    size = least
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if length else 0


class Wave(NamedTuple):
    """Rows (by index, -1 is padding) that are prefilled together, and the sizes that they are padded to."""

    indices: tuple[int, ...]
    prefix: int
    fan_out: int
    branch: int


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


def sort_rows(
    prefix_lengths: list[int], branch_lengths: list[list[int]], buckets: Buckets
) -> list[tuple[int, tuple[int, int, int]]]:
    """Rows (by index) with their sizes (prefix, fan-out, branch) of the table, longest first.

    Raises:
      InputError: an empty prefix, no branch, or something over the table; names the row.
    """
    rows = []
    for row, (prefix, branches) in enumerate(zip(prefix_lengths, branch_lengths, strict=True)):
        if prefix == 0 or not branches:
            raise InputError(f"row {row}: needs at least one prefix token and one branch")
        sizes = (
            fit(prefix, buckets.prefix, f"row {row}: prefix"),
            fit(len(branches), buckets.fan_out, f"row {row}: list of branches"),
            fit(max(branches), buckets.branch, f"row {row}: longest branch"),
        )
        rows.append((row, sizes))
    return sorted(rows, key=lambda entry: (entry[1], prefix_lengths[entry[0]]), reverse=True)


def plan_waves(prefix_lengths: list[int], branch_lengths: list[list[int]], buckets: Buckets) -> list[Wave]:
    """All rows in waves of one size, longest first, each as large as the table has it.

    Raises:
      InputError: as `sort_rows`.
    """
    waves, most = [], buckets.rows[-1]
    ordered = sort_rows(prefix_lengths, branch_lengths, buckets)
    for sizes, group in itertools.groupby(ordered, key=lambda entry: entry[1]):
        rows = [row for row, _ in group]
        for start in range(0, len(rows), most):
            indices = rows[start : start + most]
            padding = fit(len(indices), buckets.rows, "wave") - len(indices)
            waves.append(Wave((*indices, *[-1] * padding), *sizes))
    return waves
