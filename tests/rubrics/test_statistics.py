import pytest

from srrl_jax.rubrics.statistics import agreement, audit, criterion_weights, disagreement, met_share, varies


@pytest.mark.parametrize(
    ("verdicts", "met", "apart"),
    [
        ([True, True, False, False], 0.5, 1.0),
        ([True, False, False, False], 0.25, 0.75),
        ([True, None, False, None], 0.5, 1.0),
        ([True, True, None], 1.0, 0.0),
        ([False], 0.0, 0.0),
        ([None, None], None, 0.0),
        ([0.1, 0.1, 0.1], pytest.approx(0.1), 0.0),  # exactly, whatever rounding makes of their mean
        ([0.25, 0.75], 0.5, 0.25),
    ],
)
def test_how_often_a_criterion_is_met_and_whether_it_tells_answers_apart(verdicts, met, apart):
    assert met_share(verdicts) == met
    assert disagreement(verdicts) == apart and varies(verdicts) == (apart > 0)


def test_weights_of_criteria():
    verdicts = [(True, True, None), (True, False, False), (True, False, False), (True, False, False)]
    assert criterion_weights(verdicts) == [1, 1, 1]
    assert criterion_weights(verdicts, drop_unvarying=True) == [0, 1, 0]
    assert criterion_weights(verdicts, reweight=1) == [0, 0.75, 0]
    assert criterion_weights(verdicts, reweight=2, drop_unvarying=True) == [0, 0.75**2, 0]


def test_agreement_is_of_what_both_ways_could_read():
    assert agreement([True, False, None, True], [True, True, True, None]) == 0.5
    assert agreement([None], [True]) is None


ALL, NONE, HALF = [True] * 4, [False] * 4, [True, True, False, False]


@pytest.mark.parametrize(
    ("points", "first", "second", "advice", "why"),
    [
        (5, HALF, HALF, "keep", "apart"),
        (-5, HALF, HALF, "keep", "apart"),
        (5, ALL, ALL, "drop", "every answer meets it"),
        (5, NONE, NONE, "rewrite", "no answer meets it"),
        (-5, ALL, ALL, "rewrite", "every answer has this fault"),
        (-5, NONE, NONE, "keep", "no answer has this fault"),
        (5, HALF, [True, True, True, False], "keep", "apart"),  # 75%
        (5, HALF, ALL, "rewrite", "agree on 50%"),
        (5, [None] * 4, [True] * 4, "rewrite", "50% of its verdicts"),
        (5, [None, None, None, True], [None, None, True, True], "rewrite", "62% of its verdicts"),
    ],
)
def test_advice(points, first, second, advice, why):
    found = audit(points, first, second)
    assert (found.advice, why in found.why) == (advice, True)
