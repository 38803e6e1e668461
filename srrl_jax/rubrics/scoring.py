"""From verdicts to rewards."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from srrl_jax.rubrics.statistics import criterion_weights
from srrl_jax.rubrics.types import Criterion


class HasPoints(Protocol):
    @property
    def points(self) -> float: ...


def score_response(criteria: Sequence[HasPoints], verdicts: Sequence[bool | float | None]) -> float | None:
    """Points of the criteria met / sum of the positive points (the paper; simple-evals).

    `verdicts[i]` says whether `criteria[i]` was met, or how probable that is (0 to 1); None is a
    verdict that could not be read and takes its criterion out of both sums, so it neither helps nor
    hurts. Criteria with negative points subtract when met, so the score may be below 0; it is not
    clipped.

    Returns None when no criterion with positive points is left. Raises ValueError when the two
    sequences differ in length.
    """
    return _share_met([item.points for item in criteria], verdicts)


def _share_met(
    points: Sequence[float], verdicts: Sequence[bool | float | None], absolute: bool = False
) -> float | None:
    """What `score_response` says; with `absolute`, negative points count in the divisor by their size."""
    graded = [(p, met) for p, met in zip(points, verdicts, strict=True) if met is not None]
    possible = sum(abs(p) for p, _ in graded if p > 0 or absolute)
    return float(sum(p * met for p, met in graded) / possible) if possible else None


def group_rewards(
    criteria: Sequence[Criterion],
    verdicts: Sequence[Sequence[bool | float | None]],
    *,
    positive_only: bool = False,
    drop_unvarying: bool = False,
    reweight: float = 0.0,
    axis_weights: Mapping[str, float] = MappingProxyType({}),
) -> list[float | None]:
    """Rewards of a group of responses to one prompt; without options, `score_response` of each.

    Args:
      criteria: C of them.
      verdicts: for each of G responses, C verdicts as in `score_response`; a probability counts in part.
      positive_only: leave out criteria with negative points.
      drop_unvarying: leave out criteria on which all readable verdicts of the group agree; where only
        negative criteria are left, the sum of their absolute points divides.
      reweight: points count by this power of how much the group's verdicts differ (`criterion_weights`), so
        that those on which they agree count for nothing; 0 is off.
      axis_weights: a factor for the points of each axis.
    """
    weights = criterion_weights(verdicts, drop_unvarying=drop_unvarying, reweight=reweight)
    points = [c.points * axis_weights.get(c.axis, 1.0) * w for c, w in zip(criteria, weights, strict=True)]
    kept = [w > 0 and not (positive_only and c.points < 0) for c, w in zip(criteria, weights, strict=True)]
    left = [p for p, keep in zip(points, kept, strict=True) if keep]
    all_negative = (drop_unvarying or reweight > 0) and not any(p > 0 for p in left)

    rows = [[met if keep else None for met, keep in zip(row, kept, strict=True)] for row in verdicts]
    return [_share_met(points, row, all_negative) for row in rows]
