import numpy as np
import pytest

from srrl_jax.grading import Verdict
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.sampling import Completion
from srrl_jax.training.config import LossConfig, RewardConfig
from srrl_jax.training.experience import Graded, Task
from srrl_jax.training.rewards import compute_advantages, training_rewards, zero_variance_groups

RUBRIC = (
    Criterion("right", 6, ("axis:accuracy", "level:example")),
    Criterion("kind", 4, ("axis:communication_quality",)),
    Criterion("sells", -5, ("axis:accuracy",)),
)
TASK = Task(Example(({"role": "user", "content": "?"},), RUBRIC, "id"), [1], "", 0)
VERDICTS = [(True, True, False), (False, True, False), (True, True, True), (None, None, None)]
LENGTHS = [10, 20, 30, 40]  # the last is cut off


def rewards(verdicts=VERDICTS, step=0, **options):
    group = [Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), n == 40) for n in LENGTHS]
    graded = [Graded("", "", [Verdict(met, "", 1, 1) for met in row], None) for row in verdicts]
    (row,) = training_rewards([TASK], [group], [graded], RewardConfig(**options), longest=40, keys=(0, step))
    assert row.dtype == np.float32
    return row


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 0.4, 0.5, np.nan]),
        ({"criteria": "positive"}, [1, 0.4, 1, np.nan]),
        ({"drop_unvarying": True}, [1, 0, 1 / 6, np.nan]),  # all were kind
        # "right" and "sells" are each met by 2 and 1 of 3: both weigh 8 / 9, and "kind" nothing.
        ({"reweight": 1.0}, [1, 0, 1 / 6, np.nan]),
        ({"axis_weights": {"accuracy": 0.5}}, [1, 4 / 7, 4.5 / 7, np.nan]),
        ({"overlong_buffer": 20}, [1, 0.4, 0, np.nan]),
        ({"overlong": "mask"}, [1, 0.4, 0.5, np.nan]),
    ],
)
def test_rewards_by_hand(options, expected):
    np.testing.assert_allclose(rewards(**options), expected, rtol=1e-6)


def test_soft_rewards_count_probabilities():
    verdicts = [
        [Verdict(True, "", 1, 0, 0.75), Verdict(False, "", 1, 0, 0.25), Verdict(False, "", 1, 0, 0.5)]
    ]
    group = [Completion(np.zeros(5, np.int32), np.zeros(5, np.float32), False)]
    graded = [Graded("", "", row, None) for row in verdicts]
    (row,) = training_rewards([TASK], [group], [graded], RewardConfig(soft=True), longest=40, keys=(0, 0))
    np.testing.assert_allclose(row, [(6 * 0.75 + 4 * 0.25 - 5 * 0.5) / 10])


def test_dropout_leaves_criteria_out_for_a_whole_group_by_step():
    """Without "right": 1, 1, 0.25; without "kind": 1, 0, 1 / 6; and so on: never a mixture of two rubrics."""
    whole = {(1, 0.4, 0.5), (1, 0.4, 1), (1, 1, -0.25), (1, 1, 1), (1, 0, 1 / 6), (1, 0, 1)}
    seen = [rewards(step=step, criteria_dropout=0.5)[:3] for step in range(60)]
    assert {tuple(np.round(row, 5)) for row in seen} == {tuple(np.float32(np.round(row, 5))) for row in whole}
    np.testing.assert_array_equal(seen[7], rewards(step=7, criteria_dropout=0.5)[:3])


def test_masking_takes_a_truncated_completion_out():
    alike = [(True, True, False)] * 4
    np.testing.assert_array_equal(rewards(alike), [1, 1, 1, 1])
    np.testing.assert_array_equal(rewards(alike, overlong="mask"), [1, 1, 1, np.nan])


def test_only_negative_criteria_vary():
    verdicts = [(True, True, False), (True, True, True), *VERDICTS[2:]]
    np.testing.assert_allclose(rewards(verdicts, drop_unvarying=True), [0, -1, -1, np.nan])


def test_what_tells_answers_apart_better_counts_more():
    verdicts = [(True, True, False), (True, False, False), (True, False, False), (False, False, False)]
    # "right" is met by 3 of 4 and "kind" by 1 of 4: equal weights; squared they stay equal.
    np.testing.assert_allclose(rewards(verdicts, reweight=1), [1, 0.6, 0.6, 0])
    verdicts[1] = (True, True, False)  # now 2 of 4 are kind: 0.75 and 1
    np.testing.assert_allclose(rewards(verdicts, reweight=1), [1, 1, 4.5 / 8.5, 0], rtol=1e-6)
    np.testing.assert_allclose(rewards(verdicts, reweight=2), [1, 1, 3.375 / 7.375, 0], rtol=1e-6)
    np.testing.assert_allclose(
        rewards([(True, True, False), (True, True, True), *VERDICTS[2:]], reweight=1), [0, -1, -1, np.nan]
    )


def test_without_variance():
    table = np.array([[0.5, 0.5, np.nan], [0.1, 0.2, 0.2], [0.3, np.nan, np.nan], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(zero_variance_groups(table), [True, False, True, True])


@pytest.mark.parametrize(("zero_variance", "counts"), [("keep", [True, True]), ("drop", [False, True])])
def test_groups_without_variance_count_only_where_kept(zero_variance, counts):
    """They have no advantage either way; dropped, they are not in the denominator of the loss."""
    table = np.array([[0.5, 0.5, 0.5], [0.1, np.nan, 0.3]], np.float32)
    advantages, scored = compute_advantages(
        table, LossConfig(advantage="mean"), RewardConfig(zero_variance=zero_variance)
    )
    np.testing.assert_allclose(advantages, [[0, 0, 0], [-0.1, 0, 0.1]], atol=1e-6)
    np.testing.assert_array_equal(scored, [[counts[0]] * 3, [True, False, True]])
