"""Verdicts without a written reply, on the embedded checkpoint."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples
from srrl_jax.grading import Grader, GradingItem
from srrl_jax.grading.asking import closing_ids
from srrl_jax.rubrics import load_template
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig
from srrl_jax.tinyworld import grader_pairs

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"


@pytest.fixture(scope="module")
def model():
    return load_model(WORLD / "checkpoint")


@pytest.fixture(scope="module")
def grader(model):
    tokenizer = load_tokenizer(WORLD / "checkpoint")
    template = load_template(str(WORLD / "grader.txt"))

    def make(temperature=1.0, room=120, **options):
        sampler = Sampler(
            model,
            [RowLengths(room, [20] * 8)] * 4,
            new_tokens=1,
            stop_ids=tokenizer.stop_ids,
            sampling=SamplingConfig(temperature=temperature),
        )
        return Grader(sampler, tokenizer, template, **options)

    return make


@pytest.fixture(scope="module")
def params(model):
    return nnx.state(model)


@pytest.fixture(scope="module")
def items() -> list[GradingItem]:
    rows = load_examples(WORLD / "hard.jsonl")
    pairs = grader_pairs()[:6]
    return [GradingItem(said, response, rows[i].rubrics) for i, (said, response, *_) in enumerate(pairs)]


KEY = jax.random.key(4)


def test_logits_are_those_of_the_whole_sequence(grader, model, params, items, next_logits):
    judge = grader(verdict="logits")
    verdicts = judge.grade(params, items, KEY)
    assert [len(row) for row in verdicts] == [len(item.criteria) for item in items]
    for item, row in zip(items[:2], verdicts, strict=False):
        prefix, branches = judge.encode(item)
        for branch, verdict in list(zip(branches, row, strict=True))[:3]:
            logits = next_logits(model, prefix + branch, 140)
            true, false = (float(logits[i]) for i in judge.grader_prompt.candidates)
            assert verdict.probability == pytest.approx(1 / (1 + np.exp(false - true)), abs=1e-5)
            assert verdict.met == (true > false)
            assert (verdict.explanation, verdict.tries, verdict.tokens) == ("", 1, 0)


def test_constrained_draws_at_the_temperature(grader, params, items, monkeypatch):
    hard = [[v.met for v in row] for row in grader(verdict="logits").grade(params, items, KEY)]
    greedy = grader(temperature=0, verdict="constrained").grade(params, items, KEY)
    assert [[v.met for v in row] for row in greedy] == hard

    scored = [np.log([[v.probability, 1 - v.probability] for v in row]) for row in greedy[:2]]
    monkeypatch.setattr(Sampler, "score", lambda *_: scored)

    def share(**options) -> np.ndarray:
        judge = grader(verdict="constrained", **options)
        draws = [judge.grade(params, items[:2], jax.random.key(seed)) for seed in range(300)]
        return np.mean([[v.met for row in draw for v in row] for draw in draws], axis=0)

    sure = np.array([v.probability for row in greedy[:2] for v in row])
    for temperature in (1.0, 3.0):
        odds = (sure / (1 - sure)) ** (1 / temperature)
        expected = odds / (1 + odds)
        assert np.abs(share(temperature=temperature) - expected).max() < 5 * np.sqrt(0.25 / 300)
        votes = share(temperature=temperature, votes=3)
        assert np.abs(votes - (3 * expected**2 - 2 * expected**3)).max() < 5 * np.sqrt(0.25 / 300)

    draws = grader(verdict="constrained", votes=3, temperature=3.0).grade(params, items[:2], KEY)
    for verdict in [v for row in draws for v in row]:
        assert len(verdict.logged["votes"]) == 3 and (sum(verdict.votes) > 1) == verdict.met


def test_draws_depend_on_key_and_place_and_not_on_company(grader, params, items):
    judge = grader(temperature=3.0, verdict="constrained")
    verdicts = judge.grade(params, items, KEY)
    assert [[v.met for v in row] for row in judge.grade(params, items[:2], KEY)] == [
        [v.met for v in row] for row in verdicts[:2]
    ]
    others = [judge.grade(params, items, jax.random.key(seed)) for seed in range(3)]
    assert any([[v.met for v in r] for r in o] != [[v.met for v in r] for r in verdicts] for o in others)


def test_what_does_not_fit_is_unscorable(grader, params, items):
    long = items[0]._replace(response="towel " * 200)
    row, other = grader(verdict="logits").grade(params, [long, items[1]], KEY)
    assert {(v.met, v.probability, v.tries) for v in row} == {(None, None, 0)}
    assert None not in {v.met for v in other}


def test_closing_tokens_of_the_embedded_tokenizer():
    tokenizer = load_tokenizer(WORLD / "checkpoint")
    texts = {tokenizer.decode([i]) for i in closing_ids(tokenizer)}
    assert texts == {"}", '", "criteria_met": true}', '", "criteria_met": false}'}


def test_controls_take_what_an_empty_answer_is_given_off_the_odds(grader, params, items):
    plain, calibrated = (
        grader(verdict="logits", calibrate=how).grade(params, items, KEY) for how in ("none", "controls")
    )
    empty = grader(verdict="logits").grade(params, [item._replace(response="") for item in items], KEY)

    def odds(row):
        return np.array([np.log(v.probability / (1 - v.probability)) for v in row])

    moved = 0
    for item, before, after, control in zip(items, plain, calibrated, empty, strict=True):
        positive = np.array([c.points > 0 for c in item.criteria])
        bias = np.maximum(odds(control), 0)
        bias[~positive] = np.median(bias[positive])
        np.testing.assert_allclose(odds(after), odds(before) - bias, atol=1e-3)
        assert [v.met for v in after] == (odds(after) > 0).tolist()
        moved += (bias > 0.1).sum()
    assert moved  # else nothing was tried


def test_an_empty_answer_meets_nothing_under_its_own_control(grader, params, items):
    empty = [item._replace(response="") for item in items]
    rows = grader(verdict="logits", calibrate="controls").grade(params, empty, KEY)
    pairs = [
        (c, v) for item, row in zip(items, rows, strict=True) for c, v in zip(item.criteria, row, strict=True)
    ]
    assert not any(v.met for c, v in pairs if c.points > 0)
