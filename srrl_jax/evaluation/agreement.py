"""How far verdicts agree with physicians' labels, equal to simple-evals' meta-evaluation."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Pair = tuple[bool, bool]  # a rater's verdict and another's label: is the criterion met?


class Agreement(NamedTuple):
    """Pairs of (verdict, label), pooled.

    Attributes:
      both_met, only_verdict, only_label, neither: the pairs that say "met" so.
    """

    both_met: int
    only_verdict: int
    only_label: int
    neither: int

    @property
    def n(self) -> int:
        return sum(self)

    @property
    def f1_met(self) -> float | None:
        """F1 of "met"; None where the verdicts or the labels never say it."""
        return _f1(self.both_met, self.only_verdict, self.only_label)

    @property
    def f1_not_met(self) -> float | None:
        """F1 of "not met"; None where the verdicts or the labels never say it."""
        return _f1(self.neither, self.only_label, self.only_verdict)

    @property
    def f1_balanced(self) -> float | None:
        """The mean of the two: `pairwise_model_f1_balanced` of simple-evals."""
        both = self.f1_met, self.f1_not_met
        return None if None in both else sum(both) / 2


def agreement(pairs: Iterable[Pair]) -> Agreement:
    """Counts the pairs."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for verdict, label in pairs:
        counts[verdict, label] += 1
    return Agreement(*counts.values())


def grader_pairs(verdicts: Sequence[bool | None], labels: Sequence[Sequence[bool]]) -> list[Pair]:
    """Each verdict with each label of its row; a verdict of None, which could not be read, has no pair."""
    return [
        (met, label) for met, row in zip(verdicts, labels, strict=True) if met is not None for label in row
    ]


def physician_pairs(
    labels: Sequence[Sequence[bool]], physicians: Sequence[Sequence[str]]
) -> dict[str, list[Pair]]:
    """For each physician, their label with that of every other label of the same row.

    All lists together are the baseline of physicians among themselves; in it every pair stands
    twice, once from each side.
    """
    pairs = defaultdict(list)
    for row, names in zip(labels, physicians, strict=True):
        for i, (label, name) in enumerate(zip(row, names, strict=True)):
            pairs[name] += [(label, other) for j, other in enumerate(row) if j != i]
    return dict(pairs)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is not None; None for nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _f1(hits: int, wrong: int, missed: int) -> float | None:
    if hits + wrong == 0 or hits + missed == 0:
        return None
    return 2 * hits / (2 * hits + wrong + missed)
