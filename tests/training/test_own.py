"""A reward, a grader, rows and callbacks of one's own."""

import dataclasses
import importlib
import linecache
import sys

import numpy as np
import pytest
import yaml

from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem, Verdict
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.run import launch, train
from srrl_jax.run.replay import replay
from srrl_jax.sampling import Completion
from srrl_jax.training import loop
from srrl_jax.training.config import RewardConfig
from srrl_jax.training.experience import Graded, Task
from srrl_jax.training.own import OwnJudge, bring
from srrl_jax.training.rewards import training_rewards

from .conftest import WORLD


def brevity(group):
    return [r - 0.01 * n for r, n in zip(group.rewards, group.lengths, strict=True)]


def strict(conversation, response, criteria):
    return [criterion.points < 0 for criterion in criteria]


class Lenient:
    name = "lenient"

    def grade(self, items, on_progress=None):
        return [[Verdict(c.points > 0, "kind", 1, 1, 1.0) for c in item.criteria] for item in items]


def given(reward, **options):
    example = load_examples(WORLD / "easy.jsonl")[0]
    met = [(True,) * len(example.rubrics), (False,) * len(example.rubrics), (None,) * len(example.rubrics)]
    group = [Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), n == 30) for n in (10, 20, 30)]
    graded = [Graded("", f"r{i}", [Verdict(m, "", 1, 1) for m in row], None) for i, row in enumerate(met)]
    tasks = [Task(example, [1], "", 0), Task(example, [1], "", 0, met=True)]
    return training_rewards(tasks, [group] * 2, [graded] * 2, RewardConfig(**options), 30, reward)


def test_a_reward_sees_its_group_and_replaces_the_rubrics_but_not_of_lessons():
    seen = []
    rewards = given(lambda group: seen.append(group) or [2 + n for n in group.lengths])
    plain = given(lambda group: group.rewards)
    np.testing.assert_array_equal(rewards[0], [12, 22, 32])
    np.testing.assert_array_equal(rewards[1], plain[1])
    (group,) = seen
    assert group.truncated == [False, False, True] and group.responses == ["r0", "r1", "r2"]
    assert [row[0].met for row in group.verdicts] == [True, False, None]
    np.testing.assert_array_equal(group.rewards, plain[0])
    np.testing.assert_array_equal(given(brevity)[0], plain[0] - np.float32([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    "wrong",
    [lambda g: [1.0], lambda g: 1.0, lambda g: [1.0, float("inf"), 0], lambda g: [float("nan"), 0, 0],
     lambda g: None, lambda g: ["a", "b", "c"]],
)  # fmt: skip
def test_a_reward_that_is_not_one_finite_number_a_response_is_refused(wrong):
    with pytest.raises(InputError, match="reward .*lambda.*: must give one finite number for each of the 3"):
        given(wrong)


def test_a_function_and_an_object_with_grade_judge_alike():
    item = GradingItem(({"role": "user", "content": "?"},), "!", (Criterion("a", 1), Criterion("b", -1)))
    assert [[v.met for v in row] for row in OwnJudge(strict).grade([item])] == [[False, True]]
    assert [[v.met for v in row] for row in OwnJudge(Lenient()).grade([item])] == [[True, False]]
    assert OwnJudge(strict).grade([item])[0][1].probability == 1.0
    for wrong in (lambda *_: [True], lambda *_: [1, 0], lambda *_: None):
        with pytest.raises(InputError, match="grader .*: must give true, false, None"):
            OwnJudge(wrong).grade([item])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.function=brevity", "reward.function: must be package.module:name"),
        ("reward.function=json:nothing", "reward.function: cannot import json:nothing"),
        ("reward.function=json:__name__", "reward: .* is not a function"),
        ("grader=no_such_module:judge", "grader: cannot import no_such_module:judge: No module"),
        ("grader=broken:judge", r"grader: cannot import broken:judge: ZeroDivisionError.*broken.py:1"),
        ("grader=someone", "grader: must be policy, frozen, teacher or package.module:name"),
    ],
)
def test_a_name_that_is_none_is_refused(recipe, tmp_path, monkeypatch, override, message):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        bring(recipe(tmp_path, override))


class Greedy(Lenient):
    def grade(self, items):
        return super().grade(items)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"reward": lambda prompts, completions: []}, r"reward .*: is called with \(group\), but takes"),
        ({"grader": lambda response: []}, r"grader .* \(conversation, response, criteria\), but takes"),
        (
            {"grader": Greedy()},
            r"grader .*Greedy: is called with \(items, on_progress\), but takes \(items\)",
        ),
    ],
)
def test_one_with_other_arguments_is_refused(recipe, tmp_path, own, message):
    with pytest.raises(InputError, match=message):
        bring(recipe(tmp_path), **own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"reward": lambda group: group.tokens},
            r"reward .*: failed on easy-0000: AttributeError.*own.py:\d+",
        ),
        ({"reward": lambda group: [1.0]}, "one finite number for each of the 2 responses to easy-0000"),
        ({"grader": lambda *_: 1 / 0}, r"grader .*: failed on 1 responses: ZeroDivisionError.*own.py:\d+"),
        ({"grader": lambda *_: [True] * 99}, "must give true, false, None or a Verdict for each"),
    ],
)
def test_one_that_fails_is_tried_before_anything_is_compiled_or_written(
    recipe, tmp_path, monkeypatch, own, message
):
    monkeypatch.setattr(launch, "make_mesh", lambda _: pytest.fail("went on"))
    with pytest.raises(InputError, match=message):
        train(recipe(tmp_path / "run"), **own)
    assert not (tmp_path / "run").exists()


def test_what_a_reward_calls_in_its_module_is_part_of_its_identity(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, found = recipe(tmp_path / "run", "reward.function=helped:reward"), []
    for factor in (1, 1, 2):
        (tmp_path / "helped.py").write_text(
            f"def reward(group):\n    return helper(group)\n\n\n{'# longer' * factor}\n"
            f"def helper(group):\n    return {factor} * group.rewards\n"
        )
        monkeypatch.delitem(sys.modules, "helped", raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        found.append(bring(config).identity["reward"])
    assert found[0] == found[1] != found[2]


def test_only_what_is_named_is_imported(recipe, tmp_path):
    assert bring(recipe(tmp_path)).identity == {}


def test_rows_that_are_no_examples_are_refused(recipe, tmp_path):
    for rows in ([], [{"prompt": "?"}]):
        with pytest.raises(InputError, match="rows: must be at least one"):
            bring(recipe(tmp_path), rows=rows)
    answered = Example(({"role": "assistant", "content": "hi"},), (Criterion("A", 1),), "p")
    with pytest.raises(InputError, match=r"rows\[0\]: `prompt` ends with the assistant's turn"):
        bring(recipe(tmp_path), rows=[answered])
    example = load_examples(WORLD / "easy.jsonl")[0]
    with pytest.raises(InputError, match="'easy-0000' is there twice"):
        bring(recipe(tmp_path), rows=[example, example])


def test_rates_count_what_was_sampled_anew(recipe, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(loop, "rates", lambda groups, graded, times: counted.append((groups, graded)) or {})
    train(recipe(tmp_path, "steps=1", "reward.resample=2"), reward=lambda group: [0.0] * len(group.rewards))
    ((groups, graded),) = counted
    assert len(groups) == len(graded) == 3 * 2  # two prompts, none with variance in any attempt


@pytest.mark.slow
def test_a_run_with_all_of_ones_own_resumes_replays_and_refuses_another(recipe, tmp_path, monkeypatch, logs):
    (tmp_path / "mine.py").write_text("def short(group):\n    return [-n for n in group.lengths]\n")
    monkeypatch.chdir(tmp_path)
    eval = (f"data.eval={WORLD / 'hard.jsonl'}", "eval.rows=2", "checkpoint.every=1")
    config = recipe(tmp_path / "run", "reward.function=mine:short", "steps=1", *eval)
    rows = [
        dataclasses.replace(e, prompt_id=f"mine-{i}")
        for i, e in enumerate(load_examples(WORLD / "easy.jsonl")[:4])
    ]
    told = []
    own = dict(grader=strict, rows=iter(rows), callbacks=[lambda *step: told.append(step)])
    train(config, **own)
    assert [step for step, *_ in told] == [0, 1] and "eval/own" in told[0][1]
    metrics, samples = logs(tmp_path / "run")
    trained = [row for row in samples if row["split"] == "train"]
    assert {row["prompt_id"] for row in trained} <= {row.prompt_id for row in rows}
    assert all(c["verdict"] == (c["points"] < 0) for row in trained for c in row["criteria"])
    assert metrics[1]["reward/mean"] == pytest.approx(np.mean([-row["tokens"] for row in trained]))
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        kept["reward"]["function"] == "mine:short" and {"reward", "grader", "rows"} <= kept["identity"].keys()
    )

    compared, _ = replay(str(tmp_path / "run"), 1, rows=rows)
    assert {row.verdict for row in compared} == {"same"}
    with pytest.raises(InputError, match="another rows"):
        replay(str(tmp_path / "run"), 1)
    longer = dataclasses.replace(config, steps=2)
    for other, message in (
        ({"grader": Lenient()}, "another recipe: .*grader"),
        ({"rows": rows[:3]}, "began with other rows"),
    ):
        with pytest.raises(InputError, match=message):
            train(longer, **{**own, "rows": rows} | other)
    train(longer, **{**own, "rows": rows})
    assert told[-1][0] == 2
