"""The harder rubrics: their truth by hand, and rows and fixed verdicts made of them."""

import json
from collections import Counter
from random import Random

import pytest

from srrl_jax.rubrics import Example
from srrl_jax.tinyworld import grader_reply, oracle, pretraining_tree
from srrl_jax.tinyworld.harder import KINDS, draw_harder_row, harder_pairs, kind_of, random_harder_criterion

BOTH = "tells the guest to bring a towel and gives a kind wish ."
FIVE = "bring a map . wear a hat . go away now . have a lovely day . we serve lunch ."


@pytest.mark.parametrize(
    ("response", "criterion", "met", "explanation"),
    [
        (
            *("bring a towel . have a lovely day .", BOTH, True),
            "towel : bring a towel . wish : have a lovely day .",
        ),
        ("bring a towel .", BOTH, False, "towel : bring a towel . wish : nothing ."),
        ("have a lovely day .", BOTH, False, "towel : nothing ."),  # what comes first decides
        ("bring a map .", "says nothing of a towel .", True, "towel : nothing ."),
        ("bring a towel .", "says nothing of a towel .", False, "towel : bring a towel ."),
        ("we serve lunch .", "says nothing of lunch .", False, "lunch : we serve lunch ."),
        ("you do not need a towel .", "says nothing of a towel .", True, "towel : you do not need a towel ."),
        (FIVE, "is a short answer .", True, "short : . . . . ."),
        (FIVE + " good day to you .", "is a short answer .", False, "short : . . . . . ."),
    ],
)
def test_truth_and_its_reason(response, criterion, met, explanation):
    assert oracle(response, criterion) is met
    assert json.loads(grader_reply(response, criterion)) == {
        "explanation": explanation,
        "criteria_met": met,
    }


def test_rows_of_hard_have_no_plain_criterion_where_two_are_due():
    rng = Random(0)
    for split in ("easy", "hard"):
        kinds = Counter()
        for _ in range(100):
            example = Example.from_dict(draw_harder_row(split, rng, "row"))
            good = [kind_of(c.criterion) for c in example.rubrics if c.points > 0]
            assert all(-10 <= c.points <= 10 for c in example.rubrics) and "short" in good
            kinds.update(good)
            if split == "hard":  # one of an odd number is left over
                assert sum(kind not in KINDS for kind in good) <= 1
        assert kinds["compound"] > 50 and kinds["missing"] > 50


def test_corpus_and_fixed_verdicts_have_both_truths_of_each_kind():
    rng, taught = Random(0), Counter()
    for _ in range(200):
        tree = pretraining_tree(rng, draw_harder_row, random_harder_criterion)
        for criterion, reply in tree["gradings"]:
            met = json.loads(reply)["criteria_met"]
            assert met == oracle(tree["response"], criterion.criterion)
            taught[kind_of(criterion.criterion), met] += 1
    fixed = Counter()
    for _, response, criterion, truth in harder_pairs(60):
        assert oracle(response, criterion.criterion) == truth
        fixed[kind_of(criterion.criterion), truth] += 1
    for kind in KINDS:
        assert fixed[kind, True] == fixed[kind, False] == 10
        assert min(taught[kind, True], taught[kind, False]) > 15
