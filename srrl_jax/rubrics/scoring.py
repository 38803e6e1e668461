"""From verdicts to the reward of one response."""

from collections.abc import Sequence
from typing import Protocol


class HasPoints(Protocol):
    @property
    def points(self) -> float: ...


def score_response(criteria: Sequence[HasPoints], verdicts: Sequence[bool | None]) -> float | None:
    """Points of the criteria met / sum of the positive points (the paper; simple-evals).

    `verdicts[i]` says whether `criteria[i]` was met; None is a verdict that could not be read and
    takes its criterion out of both sums, so it neither helps nor hurts. Criteria with negative
    points subtract when met, so the score may be below 0; it is not clipped.

    Returns None when no criterion with positive points is left. Raises ValueError when the two
    sequences differ in length.
    """
    graded = [(item.points, met) for item, met in zip(criteria, verdicts, strict=True) if met is not None]
    possible = sum(points for points, _ in graded if points > 0)
    if possible == 0:
        return None
    return float(sum(points for points, met in graded if met) / possible)
