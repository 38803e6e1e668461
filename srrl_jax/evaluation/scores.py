"""HealthBench's score, equal to simple-evals' for equal verdicts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from srrl_jax.rubrics import Criterion, score_response

OVERALL = "overall"
ADJUSTED = "overall_length_adjusted"
LENGTH_CENTER = 2000  # characters of a response for which nothing is taken and nothing given
LENGTH_PENALTY = 0.0147  # of the score, for every further 500 characters: HealthBench Professional's
_RESAMPLES = 1000


class Score(NamedTuple):
    """A mean in [0, 1], its bootstrap standard error, and the number of responses behind it."""

    mean: float
    std_error: float
    n: int


def response_scores(
    rubrics: Sequence[Criterion], example_tags: Sequence[str], verdicts: Sequence[bool | None]
) -> dict[str, float]:
    """Scores of one response: "overall", which each example tag shares, and one of each criterion tag.

    The score of a tag is that of its criteria alone; it is left out where they have no positive
    points, or none that could be read. Not clipped. {} when nothing could be scored overall.
    """
    overall = score_response(rubrics, verdicts)
    if overall is None:
        return {}
    scores = dict.fromkeys([OVERALL, *example_tags], overall)
    of_tag = defaultdict(list)
    for item, met in zip(rubrics, verdicts, strict=True):
        for tag in item.tags:
            of_tag[tag].append((item, met))
    for tag, judged in of_tag.items():
        score = score_response(*zip(*judged, strict=True))
        if score is not None:
            scores[tag] = score
    return scores


def length_adjusted(score: float, response: str, penalty: float = LENGTH_PENALTY) -> float:
    """A response's score with its length taken into account; not clipped, as `summarize` clips means.

    Longer responses meet more criteria. Source: simple-evals' `calculate_length_adjusted_score` (see
    `srrl_jax/evaluation/README.md`), which counts characters and gives to short ones what it takes from long.

    Args:
      response: what its user would see.
      penalty: for 500 characters beyond 2000.
    """
    return score - penalty * (len(response) - LENGTH_CENTER) / 500


def summarize(scores: Sequence[Mapping[str, float]], seed: int = 0) -> dict[str, Score]:
    """The `Score` of every name in `scores`, over the responses that have it.

    Means are clipped to [0, 1], responses are not. The standard error is the deviation of 1000
    clipped means of responses drawn with replacement (simple-evals); `seed` decides the draws.
    Repeats of a row count as responses of their own, as in simple-evals.
    """
    values = defaultdict(list)
    for response in scores:
        for name, score in response.items():
            values[name].append(score)
    return {name: _score(np.asarray(column), seed) for name, column in values.items()}


def _score(values: np.ndarray, seed: int) -> Score:
    draws = np.random.default_rng(seed)
    means = [draws.choice(values, len(values)).mean() for _ in range(_RESAMPLES)]
    return Score(float(np.clip(values.mean(), 0, 1)), float(np.clip(means, 0, 1).std()), len(values))
