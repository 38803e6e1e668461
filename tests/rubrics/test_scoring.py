from types import SimpleNamespace

import pytest

from srrl_jax.rubrics import Criterion, score_response


def criteria(*points):
    return [Criterion(f"criterion {i}", p) for i, p in enumerate(points)]


@pytest.mark.parametrize(
    ("points", "verdicts", "score"),
    [
        ((5, 3, -2), (True, True, False), 1.0),
        ((5, 3, -2), (True, False, True), 3 / 8),
        ((5, 3, -2), (False, False, False), 0.0),
        ((5, 3, -4), (False, False, True), -0.5),  # only the negative one met
        ((1, -10), (False, True), -10.0),  # not clipped
        ((5, 3, -2), (True, None, False), 1.0),  # unscorable leaves the denominator
        ((5, 3, -2), (None, False, True), -2 / 3),
        ((5, 3, -2), (True, True, None), 1.0),  # an unread fault does not help or hurt
        ((2.5, 7.5), (True, False), 0.25),
        ((4, 0), (True, True), 1.0),
        ((5, 3, -2), (None, None, None), None),
        ((5, 3, -2), (None, None, True), None),  # no scorable positive criterion left
        ((-2,), (True,), None),
        ((), (), None),
    ],
)
def test_worked_by_hand(points, verdicts, score):
    assert score_response(criteria(*points), verdicts) == pytest.approx(score)


def test_takes_any_object_with_points_and_returns_a_float():
    score = score_response([SimpleNamespace(points=2)], [True])
    assert score == 1.0
    assert isinstance(score, float)


@pytest.mark.parametrize("verdicts", [[True], [True, False, None]])
def test_refuses_a_different_number_of_verdicts(verdicts):
    with pytest.raises(ValueError, match="shorter|longer"):
        score_response(criteria(1, 2), verdicts)


def test_probabilities_count_in_proportion():
    assert score_response(criteria(4, 4, -2), [0.75, None, 0.5]) == pytest.approx((3 - 1) / 4)
