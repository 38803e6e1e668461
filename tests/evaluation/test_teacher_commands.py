"""A teacher's YAML where a grader is named: srrl grade, evaluate and meta-evaluate."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from srrl_jax.cli import app
from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_pairs, oracle_score

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
HARD = WORLD / "hard.jsonl"


def srrl(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def teacher(oracle_server, teacher_file) -> Path:
    return teacher_file(oracle_server.url, "oracle-1", template=str(WORLD / "grader.txt"), retries=1)


@pytest.fixture
def completions(tmp_path) -> tuple[Path, list[float]]:
    """Lines of three Hard rows with a completion, and what the oracle gives them."""
    examples = load_examples(HARD)[:3]
    path, text = tmp_path / "done.jsonl", "have a lovely day . bring a towel ."
    lines = [e.to_dict() | {"completion": f"<think>hm</think> {text}"} for e in examples]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, [oracle_score(e, text) for e in examples]


def test_grade_goes_on_where_the_endpoint_died_and_pays_nothing_twice(
    teacher, oracle_server, completions, tmp_path
):
    path, scores = completions
    knows, graded = oracle_server.say, tmp_path / "graded.jsonl"
    command = ("grade", teacher, path, graded, "--batch", 1)
    oracle_server.say = lambda prompt, count: knows(prompt, count) if count < 8 else oracle_server.raw(0)
    with pytest.raises(InputError, match="run the same command again to go on"):
        srrl(*command)
    criteria = sum(len(e.rubrics) for e in load_examples(HARD)[:3])
    oracle_server.say = knows
    oracle_server.requests.clear()
    done = srrl(*command)
    assert done.exit_code == 0 and f"teacher oracle-1: {criteria - 8} requests paid" in done.output
    assert len(oracle_server.requests) == criteria - 8
    lines = read_jsonl(graded)
    assert [line["reward"] for line in lines] == pytest.approx(scores)
    assert all(isinstance(v["met"], bool) for line in lines for v in line["verdicts"])


def test_evaluate_takes_a_teacher_and_loads_no_model(teacher, completions, tmp_path):
    path, scores = completions
    command = ("evaluate", "someone", HARD, "--completions", path, "--limit", 3, "--grader", teacher)
    done = srrl(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert f"grader oracle-1, template {WORLD / 'grader.txt'}: " in " ".join(done.output.split())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["grader"], results["template"]) == ("oracle-1", str(WORLD / "grader.txt"))
    assert results["scores"]["overall"]["mean"] == pytest.approx(max(0, sum(scores) / 3))
    # Far below 2000 characters, so a little is given.
    adjusted = [score - 0.05 * (len("have a lovely day . bring a towel .") - 2000) / 500 for score in scores]
    again = srrl(*command, "--out", tmp_path / "out", "--length-penalty", 0.05, "--json")
    told = json.loads(again.stdout)
    assert told["scores"]["overall"] == results["scores"]["overall"] and told["length_penalty"] == 0.05
    mean = told["scores"]["overall_length_adjusted"]["mean"]
    assert mean == pytest.approx(min(1, max(0, sum(adjusted) / 3)))
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"sk-very-secret" in data for data in written)
    with pytest.raises(InputError, match="stands in its file; leave the options out"):
        srrl(*command, "--out", tmp_path / "other", "--tries", 1)


def test_meta_evaluate_takes_a_teacher(teacher, tmp_path):
    labels = tmp_path / "labels.jsonl"
    rows = [
        {"conversation": [*messages, {"role": "assistant", "content": response}],
         "criterion": criterion.criterion, "label": truth, "points": criterion.points}
        for messages, response, criterion, truth in grader_pairs()[:12]
    ]  # fmt: skip
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert srrl("meta-evaluate", teacher, labels, "--out", tmp_path / "out").exit_code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["grader"] == str(teacher) and results["unscorable"] == 0
    assert results["template"] == str(WORLD / "grader.txt")
    assert results["pooled"]["only_verdict"] == results["pooled"]["only_label"] == 0


def test_evaluate_takes_rows_of_other_schemas(teacher, completions, tmp_path):
    path, scores = completions
    professional = [
        {
            "id": example.prompt_id,
            "conversation": {"messages": list(example.prompt)},
            "rubric_items": [{"criterion_text": c.criterion, "points": c.points} for c in example.rubrics],
            "use_case": "consult",
            "difficulty": "typical",
        }
        for example in load_examples(HARD)[:3]
    ]
    own = [
        {"prompt_id": row["id"], "asked": row["conversation"], "rubric_items": row["rubric_items"]}
        for row in professional
    ]
    (tmp_path / "professional.json").write_text(json.dumps(professional))
    (tmp_path / "own.json").write_text(json.dumps(own))
    pairs = ("prompt=asked", "rubrics=rubric_items", "criterion=criterion_text")
    common = ("--completions", path, "--grader", teacher, "--json")
    for name, options in (("professional", []), ("own", [f"--field={pair}" for pair in pairs])):
        done = srrl("evaluate", "x", tmp_path / f"{name}.json", *common, *options, "--out", tmp_path / name)
        told = json.loads(done.stdout)["scores"]
        assert told["overall"]["mean"] == pytest.approx(max(0, sum(scores) / 3))
        assert ("use_case:consult" in told) == ("difficulty:typical" in told) == (name == "professional")
