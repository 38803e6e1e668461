"""Who judges in a run, and what the judge is shown."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from srrl_jax.actor import Actor
from srrl_jax.checkpoints.loading import abstract, read_config
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.grading import Verdict, WeightsJudge
from srrl_jax.parallel import make_mesh
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.run import train
from srrl_jax.run.dry_run import dry_run
from srrl_jax.sampling import Completion, RowLengths, Weights
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training.experience import Task, grade, make_actor
from srrl_jax.training.shapes import RunLengths

from .conftest import FOUR

CHECKPOINT = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld" / "checkpoint"


def values_of(params) -> np.ndarray:
    params = params.params if isinstance(params, Weights) else params
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)])


@pytest.fixture
def judges(monkeypatch) -> dict[str, list[np.ndarray]]:
    """Collects the weights that answer and the weights that judge, call by call."""
    seen: dict[str, list[np.ndarray]] = {"rollout": [], "grade": []}
    for owner, name, role in ((Actor, "answer", "rollout"), (WeightsJudge, "grade", "grade")):
        method = getattr(owner, name)

        def spy(self, first, *rest, role=role, method=method):
            seen[role].append(values_of(first if role == "rollout" else self.params))
            return method(self, first, *rest)

        monkeypatch.setattr(owner, name, spy)
    return seen


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a == b).all())


@pytest.mark.parametrize("grader", ["policy", "frozen"])
def test_the_policy_judges_at_its_current_weights_and_the_frozen_grader_at_its_first(
    recipe, judges, tmp_path, grader
):
    train(recipe(tmp_path, f"grader={grader}"))
    answers, grades = judges["rollout"], judges["grade"]
    assert len(answers) == len(grades) == 2
    assert not same(answers[0], answers[1])  # it learnt
    assert same(grades[0], answers[0])
    assert same(grades[1], answers[1] if grader == "policy" else answers[0])
    assert not any("eval/self" in row for row in read_jsonl(tmp_path / "metrics.jsonl"))  # nothing held out


def test_there_is_one_decoding_layout_at_a_time(recipe, tmp_path, monkeypatch):
    """Where frozen weights grade, or watch, they take the place of the policy's."""
    replaced, prepare = [], Actor.prepare

    def spy(self, params, replaces=None):
        made = prepare(self, params, replaces)
        assert jax.config.jax_default_matmul_precision == "highest"  # see `parallel.computing`
        gone = [x.is_deleted() for x in jax.tree.leaves(replaces.decoder)] if replaces else []
        assert all(gone)
        replaced.append(len(gone))
        return made

    monkeypatch.setattr(Actor, "prepare", spy)
    train(recipe(tmp_path, *FOUR, "steps=1", "grader=frozen"))
    assert [count > 0 for count in replaced] == [False, True] * 3  # before the step, in it, and after it


def test_ids_beyond_the_tokenizer_are_never_sampled(recipe):
    """Embeddings are padded to round sizes; the sampler's tests show that what is not allowed never comes."""
    tokenizer = load_tokenizer(CHECKPOINT)
    wide = dataclasses.replace(read_config(CHECKPOINT), vocab_size=tokenizer.size + 9)
    with jax.set_mesh(mesh := make_mesh()):
        lengths = RunLengths([RowLengths(9, [0])], [RowLengths(9, [5])])
        actor = make_actor(abstract(wide), tokenizer, recipe("unused"), mesh, lengths)
    assert actor.sampler.allowed == actor.grader.sampler.allowed == tokenizer.size


class Told:
    """Keeps what it is asked to grade."""

    def __init__(self):
        self.items = []

    def grade(self, items, on_progress):
        self.items += items
        return [[] for _ in items]


@pytest.mark.parametrize(
    ("opening", "completion", "shown"),
    [
        ("", "<think> i must be kind . </think> welcome .", "welcome ."),
        ("<think>", "i must be kind . </think> welcome .", "welcome ."),
        ("", "welcome .", "welcome ."),
        ("", "<think> no end", ""),
        ("<think>", "no end", ""),
    ],
)
def test_thoughts_never_reach_the_grader(opening, completion, shown):
    tokenizer, judge = load_tokenizer(CHECKPOINT), Told()
    tokenizer.decode = lambda ids: completion
    example = Example(({"role": "user", "content": "hi"},), (), "id")
    group = [Completion(np.array([5], np.int32), np.zeros(1, np.float32), False)]
    ((graded,),) = grade(judge, tokenizer, [Task(example, [1], opening, 0)], [group], None)
    (asked,) = judge.items
    assert asked.response == graded.response == shown
    assert graded.text == completion and graded.reward is None


def test_a_reward_comes_from_the_readable_verdicts_alone():
    class Half:
        def grade(self, items, on_progress):
            return [[Verdict(True, "", 1, 1), Verdict(None, "", 2, 2), Verdict(True, "", 1, 1)]]

    tokenizer = load_tokenizer(CHECKPOINT)
    rubrics = (Criterion("a", 4.0), Criterion("b", 100.0), Criterion("c", -1.0))
    example = Example(({"role": "user", "content": "hi"},), rubrics, "id")
    group = [Completion(np.array([5], np.int32), np.zeros(1, np.float32), False)]
    ((graded,),) = grade(Half(), tokenizer, [Task(example, [1], "", 0)], [group], None)
    assert graded.reward == 0.75


def test_a_dry_run_compiles_what_the_run_does_and_writes_nothing(recipe, tmp_path, capsys):
    config = recipe(tmp_path / "run", "rollout.max_prompt_tokens=36", "data.too_long=drop")
    dry_run(config)
    said = capsys.readouterr().out
    assert "max_prompt_tokens: 36" in said and "training: prompt, tokens" in said
    for program in ("rollout/prefill", "rollout/decode", "grade/prefill", "grade/decode", "update"):
        assert program in said
    assert not (tmp_path / "run").exists()
    train(dataclasses.replace(config, steps=1))
    assert "compiled" not in {row["event"] for row in read_jsonl(tmp_path / "run" / "events.jsonl")}
