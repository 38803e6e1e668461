"""Hand-worked scores, and simple-evals' own figures for equal verdicts on real rows."""

import hashlib

import numpy as np
import pytest

from srrl_jax.data import load_examples
from srrl_jax.evaluation.evaluate import score_samples
from srrl_jax.evaluation.scores import Score, length_adjusted, response_scores, summarize
from srrl_jax.rubrics import Criterion, Example

RUBRIC = (
    Criterion("a", 7, ("axis:accuracy", "level:example")),
    Criterion("b", 5, ("axis:completeness", "level:cluster")),
    Criterion("c", 10, ("axis:accuracy", "level:cluster")),
    Criterion("d", -6, ("axis:communication_quality", "level:example")),
)


def test_scores_of_a_response_by_hand():
    assert response_scores(RUBRIC, ("theme:hedging",), [True, False, True, True]) == {
        "overall": 11 / 22,
        "theme:hedging": 11 / 22,
        "axis:accuracy": 17 / 17,
        "axis:completeness": 0 / 5,
        "level:example": 1 / 7,
        "level:cluster": 10 / 15,
    }  # communication_quality has no positive points, so it is left out


def test_a_response_may_score_below_zero():
    scores = response_scores(RUBRIC, (), [False, False, False, True])
    assert scores["overall"] == -6 / 22 and scores["level:example"] == -6 / 7


def test_verdicts_that_could_not_be_read_leave_both_sums():
    scores = response_scores(RUBRIC, ("theme:hedging",), [None, True, True, None])
    assert scores["overall"] == scores["theme:hedging"] == 15 / 15
    assert scores["axis:accuracy"] == 10 / 10
    assert "level:example" not in scores
    assert response_scores(RUBRIC, ("theme:hedging",), [None, None, None, True]) == {}


def test_means_are_clipped_and_responses_are_not():
    scores = summarize([{"overall": -3.0, "x": -1.0}, {"overall": 0.5}, {"overall": 4.0, "x": 0.25}])
    assert scores["overall"].mean == 0.5  # (-3 + 0.5 + 4) / 3; clipped responses would give 0.5 / 3 + 1 / 3
    assert scores["x"][0] == 0.0 and scores["x"].n == 2
    assert summarize([{"overall": 2.0}, {"overall": 3.0}])["overall"] == Score(1.0, 0.0, 2)
    assert summarize([]) == {}


def test_length_is_taken_from_the_raw_score_and_then_the_mean_is_clipped():
    assert length_adjusted(0.5, "x" * 2000) == 0.5
    assert length_adjusted(0.5, "x" * 4500) == pytest.approx(0.5 - 5 * 0.0147)
    assert length_adjusted(0.5, "") == pytest.approx(0.5 + 4 * 0.0147)
    assert length_adjusted(-0.2, "x" * 2500, 0.0392) == pytest.approx(-0.2392)
    example = Example(({"role": "user", "content": "?"},), RUBRIC, "one", ())
    all_met, none_met = [True] * 3 + [False], [False] * 3 + [True]  # 1 and -6 / 22

    def sample(number, length, met):
        return {"sample": number, "response": "é" * length, "criteria": [{"verdict": v} for v in met]}

    result = score_samples([example] * 2, [sample(0, 0, all_met), sample(1, 52000, none_met)], 0.01)
    assert result.scores["overall"].mean == pytest.approx((1 - 6 / 22) / 2)
    # 1.04 is above 1 and stays so, -1.27 below 0: clipped one by one, their mean would be 0.5.
    assert result.scores["overall_length_adjusted"].mean == 0.0
    assert score_samples([example], [sample(0, 0, all_met)]).scores["overall_length_adjusted"].mean == 1.0
    unread = score_samples([example], [sample(0, 0, [None] * 4)])
    assert (unread.scores, unread.left_out) == ({}, 1)


def test_the_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    score = summarize([{"overall": value} for value in values])["overall"]
    assert score.std_error == pytest.approx(values.std() / 400**0.5, rel=0.1)
    assert summarize([{"overall": v} for v in values], seed=1)["overall"].std_error != score.std_error


# What simple-evals (HealthBenchEval.grade_sample and _aggregate_get_clipped_mean, at the commit of
# 2025) prints for these verdicts: mean, bootstrap_std, n_samples. Shares of positive and of negative
# criteria met: (0.5, 0.25) and (0.3, 0.75).
GOLDEN = {
    (0.5, 0.25): {
        "overall": (0.35879731921102576, 0.03250656840124268, 73),
        "axis:accuracy": (0.35770652007513287, 0.06748750396902331, 56),
        "axis:communication_quality": (0.4614968364968365, 0.09337458655153963, 36),
        "axis:completeness": (0.24567393555959083, 0.07489006654701535, 60),
        "axis:context_awareness": (0.4016759274645386, 0.08936857347030701, 53),
        "axis:instruction_following": (0.5684232026143791, 0.0981824451660895, 20),
        "level:cluster": (0.6, 0.042828558115658055, 55),
        "level:example": (0.28763746964702896, 0.046166779764528744, 73),
        "theme:communication": (0.36643119888718734, 0.10718805916369203, 8),
        "theme:complex_responses": (0.4034295629579739, 0.09307083230554364, 10),
        "theme:context_seeking": (0.12107668036209937, 0.06309177319794806, 5),
        "theme:emergency_referrals": (0.39594408996231223, 0.058417397547936845, 10),
        "theme:global_health": (0.4711574388520348, 0.048007571913785844, 23),
        "theme:health_data_tasks": (0.16552371226455814, 0.1023905874343214, 10),
        "theme:hedging": (0.3099680805788055, 0.0618241587677469, 7),
    },
    (0.3, 0.75): {
        "overall": (0.0, 0.0, 73),
        "axis:accuracy": (0.0, 0.0033436717475540697, 56),
        "axis:communication_quality": (0.14135748510748514, 0.10084340701960517, 36),
        "axis:context_awareness": (0.0, 0.03688197795247444, 53),
        "axis:instruction_following": (0.2545343137254902, 0.09436631816761787, 20),
        "level:cluster": (0.35757575757575755, 0.038210993663224016, 55),
        "theme:global_health": (0.026030286142631972, 0.04119103405508899, 23),
        "theme:health_data_tasks": (0.0, 0.0, 10),
    },
}


def drawn(prompt_id: str, index: int, share: float) -> bool:
    return hashlib.sha256(f"{prompt_id}/{index}".encode()).digest()[0] < share * 256


@pytest.mark.parametrize("shares", GOLDEN)
def test_equal_to_simple_evals_on_real_rows(shared_data, shares):
    scores = summarize(
        [
            response_scores(
                example.rubrics,
                example.example_tags,
                [
                    drawn(example.prompt_id, i, shares[item.points < 0])
                    for i, item in enumerate(example.rubrics)
                ],
            )
            for example in load_examples(shared_data / "healthbench" / "hard.jsonl")
        ]
    )
    for name, (mean, deviation, n) in GOLDEN[shares].items():
        assert (scores[name].mean, scores[name].n) == (pytest.approx(mean, abs=1e-12), n), name
        # Two bootstraps of 1000 draws differ by some 3%.
        assert scores[name].std_error == pytest.approx(deviation, rel=0.12, abs=0.004), name
