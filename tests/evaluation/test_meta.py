"""Verdicts against labels: scripted judges, ready verdicts, the embedded model and the oracle's labels."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from srrl_jax.cli import app
from srrl_jax.errors import InputError
from srrl_jax.evaluation.labels import LabelRow, load_labels
from srrl_jax.evaluation.meta import grade_labels, meta_evaluate, ready_verdicts, save
from srrl_jax.grading import Verdict
from srrl_jax.rubrics import Criterion
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_pairs, oracle

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
HI = ({"role": "user", "content": "hi"},)


def row(criterion: str, *labels: bool, response="hello", points=5.0, physicians=(), category="a"):
    return LabelRow(HI, response, Criterion(criterion, points), labels, physicians, category)


ROWS = [
    row("c0", True, True, physicians=("p", "q")),
    row("c0", False, response="go away", category="b"),
    row("c1", True, False, physicians=("p", "r")),
    row("c2", False, points=-3, category="b"),
    row("c3", True, points=-4, category="b"),
    row("c4", True, category=""),
]


def test_all_figures_by_hand():
    result = meta_evaluate(ROWS, [True, False, False, True, True, None])
    # (verdict, label): TT TT | FF | FT FF | TF | TT; the last could not be read.
    assert result.pooled == (3, 1, 1, 2)
    assert result.pooled.f1_balanced == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert result.categories == {"a": (2, 0, 1, 1), "b": (1, 1, 0, 1)}
    assert result.negative == (1, 1, 0, 0)
    # p says TT beside q and TF beside r; the others say the same from their side.
    assert result.physicians == (2, 1, 1, 0)
    assert result.each_physician == {"p": None, "q": None, "r": None}
    assert (result.rows, result.unscorable) == (6, 1 / 6)


class Script:
    name = "script"

    def __init__(self, patience=100):
        self.patience, self.items = patience, []

    def grade(self, items):
        if self.patience == 0:
            raise KeyboardInterrupt
        self.patience -= 1
        self.items += items
        return [[Verdict(c.criterion != "c1", "why", 1, 1) for c in item.criteria] for item in items]


def test_criteria_of_one_response_are_graded_together_and_verdicts_keep_their_order(tmp_path):
    judge = Script()
    verdicts = grade_labels(ROWS, judge, tmp_path, settings={}, chunk=1)
    assert verdicts == [True, True, False, True, True, True]
    assert [[c.criterion for c in item.criteria] for item in judge.items] == [
        ["c0", "c1", "c2", "c3", "c4"],
        ["c0"],
    ]
    assert ready_verdicts(tmp_path / "samples.jsonl", 6) == verdicts


def test_what_was_killed_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        grade_labels(ROWS, Script(patience=1), tmp_path, settings={}, chunk=1)
    judge = Script()
    assert grade_labels(ROWS, judge, tmp_path, settings={}, chunk=1) == [True, True, False, True, True, True]
    assert [item.response for item in judge.items] == ["go away"]


def test_ready_verdicts_in_order_and_what_is_refused(tmp_path):
    path = tmp_path / "verdicts.jsonl"

    def write(*lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    given = write({"criteria_met": True}, {"criteria_met": None}, {"criteria_met": False})
    assert ready_verdicts(given, 3) == [True, None, False]
    with pytest.raises(InputError, match="verdicts for 3 rows, but there are 4"):
        ready_verdicts(given, 4)
    with pytest.raises(InputError, match='object 2 needs "criteria_met"'):
        ready_verdicts(write({"criteria_met": True}, {"criteria_met": "true"}), 2)


def test_results_are_saved(tmp_path):
    save(meta_evaluate(ROWS, [True] * 6), tmp_path / "new", {"grader": "x"})
    saved = json.loads((tmp_path / "new" / "results.json").read_text())
    assert saved["grader"] == "x" and saved["pooled"]["pairs"] == 8
    assert saved["pairwise_model_f1_balanced"] is None  # it never says "not met"


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """Responses of the tiny world with the oracle's label, and a colleague's who doubts every fifth."""
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    with path.open("w") as file:
        for i, (messages, response, criterion, *_) in enumerate(grader_pairs()[:12]):
            truth = oracle(response, criterion.criterion)
            line = {
                "prompt": list(messages),
                "completion": response,
                "rubric": criterion.criterion,
                "points": criterion.points,
                "binary_labels": [truth, truth if i % 5 else not truth],
                "anonymized_physician_ids": ["oracle", "doubter"],
                "category": f"cluster:{'even' if i % 2 == 0 else 'odd'}",
            }
            file.write(json.dumps(line) + "\n")
    return path


@pytest.mark.slow
def test_the_embedded_model_against_the_oracle(labels, tmp_path):
    arguments = (
        *("meta-evaluate", WORLD / "checkpoint", labels, "--out", tmp_path, "--batch", 4),
        *("--template", WORLD / "grader.txt", "--max-new-tokens", 20, "--temperature", 1, "--tries", 1),
    )
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    for text in ("pooled", "cluster:even", "negative criteria", "physicians, pooled", "0.647", "12 rows"):
        assert text in done.output
    rows = load_labels(labels)
    met = [
        line["criteria_met"]
        for line in sorted(read_jsonl(tmp_path / "samples.jsonl"), key=lambda x: x["row"])
    ]
    truth = [r.labels[0] for r in rows]
    assert sum(a == b for a, b in zip(met, truth, strict=True)) / len(met) > 0.9
    saved = json.loads((tmp_path / "results.json").read_text())
    assert "grader's weights" in saved["identity"]
    assert saved["pooled"]["pairs"] == 24 - 2 * met.count(None)
    ready = CliRunner().invoke(
        app,
        ["meta-evaluate", str(tmp_path / "samples.jsonl"), str(labels), "--out", str(tmp_path / "ready")],
        catch_exceptions=False,
    )
    assert ready.exit_code == 0
    same = json.loads((tmp_path / "ready" / "results.json").read_text())
    assert same["pooled"] == saved["pooled"] and same["categories"] == saved["categories"]
