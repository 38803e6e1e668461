"""What verdicts on several answers to one prompt say about its criteria.

Training weighs criteria by it (`group_rewards`), and an audit of rows advises by it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Judged = bool | float | None
"""Whether an answer meets a criterion, or how probable that is; None where it could not be read."""

MOST_UNREAD = 0.5  # share of verdicts that may be unreadable
LEAST_AGREEMENT = 0.75  # share of answers on which two ways of asking are to agree


def varies(verdicts: Sequence[Judged]) -> bool:
    """Whether two readable verdicts of a group differ."""
    return len(set(verdicts) - {None}) > 1


def met_share(verdicts: Sequence[Judged]) -> float | None:
    """Share of the readable verdicts that say met; None without any."""
    read = [met for met in verdicts if met is not None]
    return sum(read) / len(read) if read else None


def disagreement(verdicts: Sequence[Judged]) -> float:
    """How well a criterion tells the answers of a group apart: 4 p (1 - p) of the share p that meet it.

    1 where half of them do, 0 where all readable ones are alike. Of probabilities, 4 times their variance.
    """
    if not varies(verdicts):
        return 0.0
    read = [met for met in verdicts if met is not None]
    share = sum(read) / len(read)
    return 4 * sum((met - share) ** 2 for met in read) / len(read)


def criterion_weights(
    verdicts: Sequence[Sequence[Judged]], *, drop_unvarying: bool = False, reweight: float = 0.0
) -> list[float]:
    """A factor for the points of each criterion, from the verdicts of a group on it.

    Args:
      verdicts: of each answer, one for each criterion.
      drop_unvarying: 0 for a criterion that does not tell the answers apart (DR Tulu).
      reweight: the power of `disagreement` that a criterion counts by; 0 leaves points as they are.
    """
    columns = list(zip(*verdicts, strict=True))
    if reweight:
        return [disagreement(column) ** reweight for column in columns]
    return [float(not drop_unvarying or varies(column)) for column in columns]


def agreement(first: Sequence[Judged], second: Sequence[Judged]) -> float | None:
    """Share of answers that two ways of asking judge alike, of those that both could read; None without."""
    pairs = [pair for pair in zip(first, second, strict=True) if None not in pair]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


class Audit(NamedTuple):
    """What answers say about one criterion.

    Attributes:
      met: share of the answers that meet it, by the first way of asking; None where none could be read.
      disagreement: how well it tells answers apart, 0 to 1.
      agreement: share of the answers on which both ways of asking agree; None where none could be read twice.
      unread: share of the verdicts of both ways that could not be read.
      advice, why: what to do with it.
    """

    met: float | None
    disagreement: float
    agreement: float | None
    unread: float
    advice: Literal["keep", "drop", "rewrite"]
    why: str


def audit(points: float, first: Sequence[bool | None], second: Sequence[bool | None]) -> Audit:
    """What two ways of asking about the same answers say about a criterion of so many points."""
    unread = [*first, *second].count(None) / (2 * len(first))
    found = met_share(first), disagreement(first), agreement(first, second), unread
    met, _, agreed, _ = found
    if unread > MOST_UNREAD or agreed is None:
        return Audit(*found, "rewrite", f"{unread:.0%} of its verdicts cannot be read")
    if agreed < LEAST_AGREEMENT:
        return Audit(*found, "rewrite", f"two ways of asking agree on {agreed:.0%} of the answers only")
    if varies(first):
        return Audit(*found, "keep", "tells answers apart")
    if points < 0 and not met:
        return Audit(*found, "keep", "no answer has this fault; it is there for those that will")
    if points > 0 and met:
        return Audit(*found, "drop", "every answer meets it, so it rewards nothing")
    if points > 0:
        return Audit(*found, "rewrite", "no answer meets it: ask for less, or for its parts")
    return Audit(*found, "rewrite", "every answer has this fault: is it one?")
