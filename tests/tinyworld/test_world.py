import re
from random import Random

import pytest

from srrl_jax.tinyworld.corpus import draw_quality, pretraining_tree
from srrl_jax.tinyworld.oracle import oracle_score
from srrl_jax.tinyworld.rows import draw_row, hard_rows
from srrl_jax.tinyworld.world import (
    ITEMS,
    STYLE,
    Facts,
    draw_facts,
    facts_of,
    split_of,
    write_prompt,
    write_response,
)


def test_every_item_belongs_to_one_name():
    items = [item for names in ITEMS.values() for item in names.values()]
    names = [name for table in ITEMS.values() for name in table]
    assert len(set(items)) == len(items)
    assert len(set(names)) == len(names)
    assert not set(items) & set(names)


@pytest.mark.parametrize("split", ["easy", "hard", "pretraining"])
def test_a_prompt_mentions_exactly_its_facts(split):
    rng = Random(0)
    for _ in range(500):
        facts = draw_facts(split, rng)
        prompt = write_prompt(facts, rng)
        assert facts_of(prompt) == facts
        assert re.fullmatch(r"[a-z]+( [a-z]+| [.?])*", prompt)
        assert len(prompt.split()) < 28


def test_prompt_in_plain_sight():
    facts = Facts(place="lake", weather="rain", companion="dog")
    prompts = {write_prompt(facts, Random(seed)) for seed in range(300)}
    assert "we go to the lake in the rain with our dog . what should we do ?" in prompts
    assert len(prompts) > 100


def test_hard_is_a_quarter_of_the_large_combinations():
    combinations = [
        Facts(place, weather, companion, time)
        for place in ITEMS["place"]
        for weather in ITEMS["weather"]
        for companion in ITEMS["companion"]
        for time in ITEMS["time"]
    ]
    hard = sum(split_of(facts) == "hard" for facts in combinations)
    assert 0.22 < hard / len(combinations) < 0.28
    assert split_of(Facts(place="lake")) != "hard"


def test_best_answer_has_every_due_item_and_nothing_bad():
    facts = Facts("lake", "rain", "dog", "noon")
    for seed in range(50):
        words = set(write_response(facts, Random(seed), 1.0).split())
        assert {"towel", "raincoat", "lead", "lunch"} <= words
        assert not words & {"gold", "bother", "silly", "away", "room", "net", "hat", "supper"}


def test_worst_answer_has_no_due_item():
    facts = Facts("lake", "rain", "dog", "noon")
    for seed in range(200):
        response = write_response(facts, Random(seed), 0.0)
        assert not any(wish in response for wish in STYLE["wish"])
        assert "bring a towel" not in response and "lunch is ready" not in response


def test_scores_leave_room_to_learn():
    """The pretraining mixture scores low on Hard with a wide spread; the best answer about 1."""
    rng = Random(0)
    mixture, best, spreads = [], [], []
    for row in hard_rows(100, 7):
        facts = facts_of(row["prompt"][0]["content"])
        answers = [write_response(facts, rng, draw_quality(rng)) for _ in range(8)]
        scores = [oracle_score(row, answer) for answer in answers]
        mixture += scores
        spreads.append(max(scores) - min(scores))
        best.append(oracle_score(row, write_response(facts, rng, 1.0)))
    assert 0.25 < sum(mixture) / len(mixture) < 0.40
    assert sum(spreads) / len(spreads) > 0.6
    assert sum(best) / len(best) > 0.95


def test_pretraining_never_sees_an_easy_or_hard_combination():
    rng = Random(0)
    for _ in range(1000):
        facts = facts_of(pretraining_tree(rng)["prompt"][0]["content"])
        assert split_of(facts) == "pretraining"
    assert split_of(facts_of(draw_row("hard", rng)["prompt"][0]["content"])) == "hard"
