"""From replies to verdicts: unreadable ones are asked for again, the majority of the readable ones counts."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from srrl_jax.grading.gap import Gap
from srrl_jax.rubrics import parse_explanation, parse_verdict, parse_verdicts

Query = list[int]  # the criteria, by their places in the rubric, that one reply is about


class Verdict(NamedTuple):
    """What the grader said of one criterion.

    Attributes:
      met: None where no reply could be read: unscorable, which neither helps nor hurts.
      explanation: the grader's reason, or "".
      tries: how often it was asked.
      tokens: sampled in all replies; one about several criteria is shared among them.
      probability: that it is met: the model's own, where replies are not written out, else the share
        of the votes; None where `met` is.
      gap: what 8 bits changed in the first reply about it, where that was measured.
      votes: what each readable reply, or each draw, said.
    """

    met: bool | None
    explanation: str
    tries: int
    tokens: float
    probability: float | None = None
    gap: Gap | None = None
    votes: Sequence[bool] = ()

    @property
    def logged(self) -> dict[str, list[bool]]:
        """The votes, for a log, where they are more than the verdict."""
        return {"votes": list(self.votes)} if len(self.votes) > 1 else {}


class Reply(NamedTuple):
    """A grader's text, with the number of its tokens, and what 8 bits changed where that was measured."""

    text: str
    tokens: int
    gap: Gap | None = None


Ask = Callable[[int, Mapping[int, Sequence[Query]]], Sequence[Sequence[Reply]]]


class _Votes:
    """What the replies say of one criterion: (met, explanation) of the readable ones."""

    def __init__(self) -> None:
        self.read: list[tuple[bool, str]] = []
        self.tries, self.tokens = 0, 0.0
        self.gap: Gap | None = None

    def verdict(self) -> Verdict:
        """The majority's, with its first explanation; a tie is unscorable."""
        votes = [met for met, _ in self.read]
        counts = Counter(votes)
        if counts[True] == counts[False]:
            return Verdict(None, "", self.tries, self.tokens, gap=self.gap, votes=votes)
        met = counts[True] > counts[False]
        explanation = next(why for vote, why in self.read if vote == met)
        share = counts[True] / len(votes)
        return Verdict(met, explanation, self.tries, self.tokens, share, self.gap, votes)


def collect_verdicts(
    criteria: Sequence[int], rows: Sequence[int], ask: Ask, *, tries: int, votes: int, together: bool
) -> list[list[Verdict]]:
    """Requests a verdict on every criterion, and requests unreadable ones again, up to `tries` times in all.

    Args:
      criteria: the number of criteria of each item.
      rows: the items to ask about; the others' verdicts are unscorable.
      ask: given the attempt, from 0, and the queries of each item that has any, the replies of each:
        `votes` of its first query, then of its second, ...
      together: one query for all unread criteria of an item, not one for each.
    """
    counts = [[_Votes() for _ in range(number)] for number in criteria]
    for attempt in range(tries):
        unread = {i: [c for c, v in enumerate(counts[i]) if v.verdict().met is None] for i in rows}
        asked = {i: queries(missing, together) for i, missing in unread.items() if missing}
        if not asked:
            break
        for (i, row), replies in zip(asked.items(), ask(attempt, asked), strict=True):
            for place, reply in enumerate(replies):
                query = row[place // votes]
                counts[i][query[0]].gap = reply.gap or counts[i][query[0]].gap
                for c, (met, explanation) in zip(query, _read(reply.text, len(query)), strict=True):
                    counts[i][c].tries = attempt + 1
                    counts[i][c].tokens += reply.tokens / len(query)
                    if met is not None:
                        counts[i][c].read.append((met, explanation))
    return [[count.verdict() for count in row] for row in counts]


def queries(criteria: Sequence[int], together: bool) -> list[Query]:
    """One query for each criterion, or for all of them."""
    if together:
        return [list(criteria)] if criteria else []
    return [[c] for c in criteria]


def _read(text: str, criteria: int) -> list[tuple[bool | None, str]]:
    if criteria == 1:
        return [(parse_verdict(text), parse_explanation(text))]
    return parse_verdicts(text, criteria)
