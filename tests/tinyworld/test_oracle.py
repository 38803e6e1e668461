from random import Random

import pytest

from srrl_jax.tinyworld.oracle import evidence, oracle, oracle_score
from srrl_jax.tinyworld.rows import ITEM_CRITERIA, STYLE_CRITERIA
from srrl_jax.tinyworld.world import ADVICE, ITEMS, STYLE, WAIVERS, advise

TOWEL = "tells the guest to bring a towel ."


@pytest.mark.parametrize(
    ("response", "met"),
    [
        ("bring a towel for the lake .", True),
        ("do not forget a towel .", True),
        ("you will need a towel at the lake .", True),
        ("good day to you . Bring a towel. go away now .", True),
        (" take a towel in the rain today", True),
        ("you do not need a towel .", False),
        ("do not bring a towel .", False),
        ("towel towel towel .", False),
        ("towel lake bring a .", False),
        ("bring a towel a map a rope .", False),
        ("bring a map . a towel .", False),
        ("bring a basket for the lake .", False),
        ("bring a towels .", False),
        ("bring a towel ?", False),
        ("", False),
        (TOWEL, False),
    ],
)
def test_advice_of_a_towel(response, met):
    assert oracle(response, TOWEL) is met
    assert oracle(response, "says that a towel is needed .") is met


@pytest.mark.parametrize(
    ("criterion", "met", "unmet"),
    [
        ("offers supper to the guest .", "join us for supper .", "we do not serve supper ."),
        ("welcomes the guest .", "welcome to the inn .", "welcome ."),
        ("gives a kind wish .", "have a lovely day .", "a lovely lovely day ."),
        ("asks something back .", "when will you leave ?", "when you leave ."),
        ("tries to sell something .", "buy our gold card .", "bring our gold card ."),
        ("is rude to the guest .", "go away now .", "go now ."),
        ("repeats a sentence .", "go away now . go away now .", "go away now . go now ."),
    ],
)
def test_other_criteria(criterion, met, unmet):
    assert oracle(f"bring a map . {met}", criterion)
    assert not oracle(f"bring a map . {unmet}", criterion)


def test_every_wording_meets_its_criterion_and_no_other_items():
    rng = Random(0)
    texts = {
        item: [ITEM_CRITERIA[slot][0].format(item=item), ITEM_CRITERIA[slot][1].format(item=item)]
        for slot, names in ITEMS.items()
        for item in names.values()
    }
    for slot, names in ITEMS.items():
        for name, item in names.items():
            sentences = {advise(slot, name, item, rng) for _ in range(50)}
            assert len(sentences) == len(ADVICE[slot])
            for sentence in sentences:
                for other, criteria in texts.items():
                    assert [oracle(sentence, text) for text in criteria] == [other == item] * 2
            assert not oracle(WAIVERS[slot].format(item=item), texts[item][0])


def test_every_style_sentence_meets_only_its_kind():
    for kind, sentences in STYLE.items():
        for sentence in sentences:
            for other, criteria in STYLE_CRITERIA.items():
                for text in criteria:
                    assert evidence(sentence, text) == (sentence if other == kind else None)


def test_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="not a criterion"):
        oracle("bring a map .", "is helpful .")


def test_score_by_hand():
    row = {
        "prompt": [{"role": "user", "content": "we go to the lake . any advice for us ?"}],
        "rubrics": [
            {"criterion": TOWEL, "points": 6},
            {"criterion": "gives a kind wish .", "points": 4},
            {"criterion": "insults the guest .", "points": -5},
        ],
    }
    assert oracle_score(row, "bring a towel for the lake .") == pytest.approx(0.6)
    assert oracle_score(row, "bring a towel for the lake . go away now .") == pytest.approx(0.1)
    assert oracle_score(row, "go away now .") == pytest.approx(-0.5)
