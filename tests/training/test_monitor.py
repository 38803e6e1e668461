"""Held-out answers under several judges, and the warning where they part."""

import math

import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.grading import Verdict
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.run import train
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import oracle_score
from srrl_jax.training import TrainConfig
from srrl_jax.training.config import EvalConfig
from srrl_jax.training.experience import Graded, Task
from srrl_jax.training.monitor import control_items, control_metrics, divergence_warnings, eval_metrics
from srrl_jax.viewer.report import write_report


def row(*criteria: tuple[str, float, bool | None, bool | None], tokens: int = 10) -> dict:
    """A row of samples.jsonl; criteria are (text, points, verdict, the frozen judge's)."""
    names = ("criterion", "points", "verdict", "frozen")
    return {"tokens": tokens, "criteria": [dict(zip(names, c, strict=True)) for c in criteria]}


def test_all_figures_by_hand():
    rows = [
        row(("all", 4, True, True), ("none", 4, False, None), ("bad", -2, i == 0, False), tokens=10 + i)
        for i in range(4)
    ]
    rows.append(row(("rare", 1, None, False), ("all", 3, True, False), tokens=14))
    metrics = eval_metrics(rows)
    assert metrics["eval/self"] == pytest.approx((0.25 + 3 * 0.5 + 1) / 5)
    assert metrics["eval/frozen"] == pytest.approx((4 * 1 + 0) / 5)  # unread criteria leave both sums
    assert metrics["grader/agreement_frozen"] == 7 / 10  # of those that the frozen judge could read
    assert metrics["eval/unscorable"] == 1 / 14
    assert metrics["eval/met_rate_negative"] == 1 / 4
    # "rare" has too few verdicts; "bad" is met by one of four.
    assert metrics["eval/saturated_met"] == metrics["eval/saturated_unmet"] == 1 / 3
    assert metrics["eval/mean_length"] == 12
    alone = eval_metrics([{"tokens": 1, "criteria": [{"criterion": "a", "points": 5, "verdict": None}]}])
    assert math.isnan(alone["eval/self"]) and "eval/frozen" not in alone


@pytest.mark.parametrize(
    ("live", "others", "warned"),
    [
        (0.5, {"frozen": 0.3}, ["frozen start"]),
        (0.3, {"frozen": 0.5}, ["frozen start"]),
        (0.5, {"frozen": 0.45, "teacher": 0.2}, ["the teacher"]),
        (0.5, {"frozen": 0.3, "teacher": 0.2}, ["frozen start", "the teacher"]),
        (math.nan, {"frozen": 0.3}, []),
        (0.5, {"frozen": math.nan}, []),
        (0.5, {}, []),
    ],
)
def test_a_warning_needs_a_gap_over_the_margin(live, others, warned):
    metrics = {"eval/self": live} | {f"eval/{name}": score for name, score in others.items()}
    messages = divergence_warnings(metrics, EvalConfig(margin=0.1))
    assert len(messages) == len(warned)
    assert all(
        who in said and "eval.margin (0.1)" in said for who, said in zip(warned, messages, strict=True)
    )


def test_verdicts_may_part_where_scores_do_not():
    metrics = {"eval/self": 0.2, "eval/frozen": 0.2, "grader/agreement_frozen": 0.7}
    (message,) = divergence_warnings(metrics, EvalConfig(agreement=0.75))
    assert "0.700" in message and "eval.agreement (0.75)" in message
    assert not divergence_warnings(metrics, EvalConfig(agreement=0.7))


def test_a_policy_that_nobody_can_read_agrees_with_nobody():
    readable = row(("a", 5, True, True))
    broken = [row(("a", 5, None, True), ("b", 5, None, False)) for _ in range(4)]
    metrics = eval_metrics([readable, *broken])
    assert metrics["grader/agreement_frozen"] == 1 / 9 and metrics["eval/unscorable"] == 8 / 9
    assert metrics["eval/self"] == 1  # of the one verdict that can be read
    (message,) = divergence_warnings(metrics, EvalConfig(margin=1))
    assert "0.111" in message and "0.889 of the policy's could not be read" in message


def test_controls_ask_for_positive_criteria_on_answers_that_cannot_meet_them():
    rubric = (Criterion("good", 5), Criterion("bad", -5))
    tasks = [
        Task(Example(({"role": "user", "content": p},), rubric, p), [1], "", i) for i, p in enumerate("abc")
    ]
    graded = [[Graded("", f"answer to {task.example.prompt_id}", [], 0)] for task in tasks]
    items = control_items(tasks, graded, 2)
    assert [item.response for item in items] == ["", "", "answer to b", "answer to c"]
    assert all(list(item.criteria) == [rubric[0]] for item in items)
    assert control_items(tasks, graded, 0) == []
    verdicts = [[Verdict(met, "", 1, 1)] for met in (True, None, True, False)]
    assert control_metrics(verdicts) == {"grader/control_met_rate": 1, "grader/control_met_rate_other": 0.5}


@pytest.mark.parametrize(("rate", "warned"), [(0.2, 0), (0.21, 1), (math.nan, 0)])
def test_a_grader_that_finds_empty_answers_good_is_warned_of(rate, warned):
    messages = divergence_warnings({"grader/control_met_rate": rate}, EvalConfig(control_met=0.2))
    assert len(messages) == warned
    assert all("met by an empty answer" in message for message in messages)


@pytest.mark.slow
def test_a_warning_ends_the_run_where_it_is_asked_to(recipe, tmp_path, logs):
    keys = (*EVAL, "steps=3", "eval.every=1", "eval.agreement=1.1")  # which warns always
    train(recipe(tmp_path, *keys, "eval.stop_on_warning=true"))
    assert logs(tmp_path)[0][-1]["step"] == 1 and (tmp_path / "checkpoints" / "1").is_dir()
    assert read_jsonl(tmp_path / "events.jsonl")[-1]["event"] == "stopped"
    train(recipe(tmp_path, *keys))
    assert logs(tmp_path)[0][-1]["step"] == 3


@pytest.fixture
def teacher(oracle_server, tmp_path) -> list[str]:
    """Overrides that give a run the oracle as its teacher."""
    return [
        f"teacher.base_url={oracle_server.url}",
        "teacher.model=oracle-1",
        "teacher.key_env=TEACHER_KEY",
        f"teacher.cache={tmp_path / 'cache.sqlite'}",
        "teacher.template=srrl_jax/tinyworld/grader.txt",
        "teacher.backoff=0.001",
        "teacher.retries=1",
    ]


def truth_of(row: dict) -> float:
    """The oracle's score of a row of samples.jsonl."""
    rubrics = [{"criterion": c["criterion"], "points": c["points"]} for c in row["criteria"]]
    return oracle_score({"prompt": row["prompt"], "rubrics": rubrics}, row["response"])


EVAL = ("data.eval=srrl_jax/tinyworld/hard.jsonl", "eval.rows=4", "eval.samples=2")


@pytest.mark.slow
def test_a_run_is_watched_by_all_its_judges(recipe, teacher, tmp_path, capsys):
    run = tmp_path / "run"
    overrides = [*EVAL, *teacher, "optimizer.learning_rate=0.01", "optimizer.minibatches=1"]
    train(recipe(run, *overrides, "eval.margin=0", "eval.agreement=1"))
    start, _, end = read_jsonl(run / "metrics.jsonl")
    # At the start the two have the same weights and the same random keys.
    assert start["eval/self"] == start["eval/frozen"] and start["grader/agreement_frozen"] == 1
    assert end["eval/self"] != end["eval/frozen"] and end["grader/agreement_frozen"] < 1
    samples = [row for row in read_jsonl(run / "samples.jsonl") if row["split"] == "eval"]
    truth = [truth_of(row) for row in samples if row["step"] == 2]
    assert end["eval/teacher"] == pytest.approx(np.mean(truth))
    warnings = [row for row in read_jsonl(run / "events.jsonl") if "eval.margin" in row["message"]]
    assert [row["step"] for row in warnings if "frozen start" in row["message"]] == [2]
    parted = [row for row in read_jsonl(run / "events.jsonl") if "eval.agreement" in row["message"]]
    assert [row["step"] for row in parted] == [2]
    shown = capsys.readouterr().out
    assert all(row["message"] in shown for row in warnings)
    page = write_report(run).read_text()
    assert "Warnings" in page and "further apart than" in page and "graded by the teacher" in page


@pytest.mark.slow
def test_a_teacher_can_be_the_grader_and_its_death_costs_nothing_paid(
    recipe, teacher, oracle_server, tmp_path
):
    knows, run = oracle_server.say, tmp_path / "run"
    overrides = [*teacher, "grader=teacher", "checkpoint.every=1"]

    def dies(prompt, count):
        return knows(prompt, count) if count < 30 else oracle_server.raw(0)

    oracle_server.say = dies
    with pytest.raises(InputError, match="run the same command again to go on"):
        train(recipe(run, *overrides))
    paid = {request["messages"][0]["content"] for request in oracle_server.requests[:30]}
    oracle_server.requests.clear()
    oracle_server.say = knows
    train(recipe(run, *overrides, "teacher.concurrency=4"))  # which may change
    again = {request["messages"][0]["content"] for request in oracle_server.requests}
    assert again and not again & paid
    for row in read_jsonl(run / "samples.jsonl"):
        assert row["reward"] == pytest.approx(truth_of(row))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)


def test_a_teacher_without_a_key_is_refused_before_anything_starts(recipe, teacher, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="grader: teacher needs the key teacher"):
        recipe(tmp_path / "run", "grader=teacher")
    with pytest.raises(InputError, match="did you mean 'teacher.template'"):
        recipe(tmp_path / "run", *teacher, "teacher.templat=x")
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(InputError, match="TEACHER_KEY is not set"):
        train(recipe(tmp_path / "run", *teacher))
    assert not (tmp_path / "run").exists()
    assert TrainConfig.from_dict(recipe(tmp_path / "run", *teacher).to_dict()).teacher.model == "oracle-1"
