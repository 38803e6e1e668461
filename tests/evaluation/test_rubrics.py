"""`srrl rubrics`: written by a scripted teacher or model, audited by such a teacher and by the tiny model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from srrl_jax.actor import Answer
from srrl_jax.cli import app
from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
RUBRIC = [
    {"criterion": "Asks how long it has hurt", "points": 6, "axis": "context_awareness"},
    {"criterion": "Asks how long it has hurt.", "points": 5},
    {"criterion": "Names rest", "points": 3},
    {"criterion": "Is kind", "points": 2},
    {"criterion": "Prescribes a drug by name", "points": -8},
]


def srrl(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def teacher(chat_server, teacher_file) -> Path:
    return teacher_file(chat_server.url, "writer-1", retries=0)


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Six prompts, in two schemas; the second has a reference answer."""
    rows = [{"prompt": f"Prompt {i} hurts?", "prompt_id": str(i)} for i in range(5)]
    rows[1]["ideal_completions_data"] = {"ideal_completion": "Rest it."}
    path = tmp_path / "prompts.jsonl"
    rows.append({"conversation": {"messages": [{"role": "user", "content": "Prompt 5 hurts?"}]}, "id": "5"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rubrics_are_written_once_and_go_on_where_they_stopped(teacher, chat_server, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    seen = []

    def say(prompt, count):
        number = int(prompt.rpartition("Prompt ")[2][0])
        seen.append(number)
        if number == 3 and seen.count(3) == 1:
            return "I would rather not."
        if number == 4:
            return chat_server.raw(503) if down else "never"
        return f"```json\n{json.dumps(RUBRIC)}\n```"

    chat_server.say, down = say, True
    command = ("rubrics", "write", prompts, out, "--writer", teacher, "--batch", 1, "--tries", 2)
    with pytest.raises(InputError, match="run the same command again to go on"):
        srrl(*command)
    assert [row["prompt_id"] for row in read_jsonl(out)] == ["0", "1", "2", "3"]
    assert seen == [0, 1, 2, 3, 3, 4]
    with out.open("ab") as file:
        file.write(b'{"prompt": [{"ro')  # killed in the midst of a line
    down = False
    done = srrl(*command)
    assert done.exit_code == 1 and "no rubric for 4: no JSON list alone" in done.output
    assert "1 new rows" in done.output and "1 prompts without a rubric" in done.output
    assert seen[6:] == [4, 4, 5]
    again = srrl(*command)
    assert (
        "0 new rows" in again.output and len(seen) == 9
    )  # what was paid is in the cache, also what was no rubric
    examples = load_examples(out)
    assert [e.prompt_id for e in examples] == ["0", "1", "2", "3", "5"]
    kept = [item["criterion"] for item in RUBRIC if not item["criterion"].endswith("hurt.")]
    assert all([c.criterion for c in e.rubrics] == kept for e in examples)
    assert examples[0].rubrics[0].axis == "context_awareness" and examples[0].rubrics[-1].points == -8
    assert examples[0].example_tags == ("rubrics:teacher.yaml",)
    asked = [body["messages"][-1]["content"] for body in chat_server.requests]
    assert [("Rest it." in prompt) for prompt in asked[:3]] == [False, True, False]
    with pytest.raises(InputError, match="was made with other settings: seed was 0, now 1"):
        srrl(*command, "--seed", 1)


def test_a_model_of_the_machine_writes_too(prompts, tmp_path, monkeypatch):
    calls = []

    class Checkpoint:
        def __init__(self, source, runtime):
            assert source == "some/model" and runtime.batch == 3
            self.identity = {"weights": weights}

        def answer(self, turns, ids, key, config):
            calls.append(ids)
            return [Answer("", json.dumps(RUBRIC), 3, False) for _ in turns]

    monkeypatch.setattr("srrl_jax.evaluation.rubrics.Checkpoint", Checkpoint)
    command = ("rubrics", "write", prompts, tmp_path / "out.jsonl", "--writer", "some/model", "--batch", 3)
    weights = "a"
    done = srrl(*command)
    assert done.exit_code == 0 and len(load_examples(tmp_path / "out.jsonl")) == 6
    assert [len(set(ids)) for ids in calls] == [3, 3]
    weights = "b"
    with pytest.raises(InputError, match="was made with other weights"):
        srrl(*command)


def test_bad_prompts_are_refused_before_a_writer_is_asked(teacher, chat_server, tmp_path):
    for rows, message in (
        ([{"prompt": "a"}, {"prompt": []}], r"prompts.jsonl:2: `prompt` is empty"),
        ([{"prompt": "a", "prompt_id": "x"}] * 2, r"prompts.jsonl:2: prompt_id 'x' is already used at .*:1"),
        ([{"query": "a"}], "no `prompt`: add it, or name the fields"),
    ):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=message):
            srrl("rubrics", "write", tmp_path / "prompts.jsonl", tmp_path / "out", "--writer", teacher)
    assert not chat_server.requests
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"query": "a"}))
    chat_server.say = lambda prompt, count: json.dumps(RUBRIC)
    done = srrl(
        "rubrics",
        "write",
        tmp_path / "prompts.jsonl",
        tmp_path / "out",
        "--writer",
        teacher,
        "--field",
        "prompt=query",
    )
    assert done.exit_code == 0


HOSTILE = "says <script>alert(1)</script>"


def test_an_audit_says_what_criteria_are_worth(teacher, chat_server, tmp_path):
    """Verdicts follow from the words of an answer; "kind" is judged otherwise by the second template."""
    row = {
        "prompt": [{"role": "user", "content": f"My knee {HOSTILE}"}],
        "prompt_id": "knee",
        "rubrics": [
            {"criterion": "names rest", "points": 5},
            {"criterion": "names ice", "points": 3},
            {"criterion": "is kind", "points": 2},
            {"criterion": HOSTILE, "points": 4},
            {"criterion": "names a drug", "points": -8},
        ],
    }
    only_dropped = {
        "prompt": "ice?",
        "prompt_id": "ice",
        "rubrics": [{"criterion": "names ice", "points": 1}],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row, only_dropped]))
    answers = ["rest ice", "ice", "rest ice", "ice"]
    lines = [{"prompt_id": name, "completion": text} for name in ("knee", "ice") for text in answers]
    (tmp_path / "done.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def say(prompt, count):
        fenced = "========" in prompt
        said = (
            prompt.rpartition("=\n")[0].rpartition("=\n")[2] if fenced else prompt.partition("assistant: ")[2]
        )
        said = said.splitlines()[0]
        if "] is kind" in prompt:
            return json.dumps({"criteria_met": fenced})
        return json.dumps({"criteria_met": any(f"] names {word}" in prompt for word in said.split())})

    chat_server.say = say
    common = (
        "rubrics",
        "audit",
        tmp_path / "rows.json",
        "--model",
        "x",
        "--completions",
        tmp_path / "done.jsonl",
    )
    common += ("--grader", teacher, "-n", 4, "--out", tmp_path / "out", "--batch", 1)
    done = srrl(*common, "--json")
    told = {"keep": 2, "rewrite": 2, "drop": 2, "rows": 2, "rows_left_out": 1}
    assert json.loads(done.stdout) == told
    paid = len(chat_server.requests)
    assert paid == 2 * (2 * 5 + 2 * 1)  # equal answers are asked about once, in either way
    found = read_jsonl(tmp_path / "out" / "audit.jsonl")
    assert [(line["advice"], line["met"], line["disagreement"], line["agreement"]) for line in found] == [
        ("keep", 0.5, 1.0, 1.0),
        ("drop", 1.0, 0.0, 1.0),
        ("rewrite", 1.0, 0.0, 0.0),
        ("rewrite", 0.0, 0.0, 1.0),
        ("keep", 0.0, 0.0, 1.0),
        ("drop", 1.0, 0.0, 1.0),
    ]
    (cleaned,) = load_examples(tmp_path / "out" / "rows.jsonl")
    assert [(c.criterion, c.tags) for c in cleaned.rubrics] == [
        ("names rest", ()),
        ("is kind", ("audit:rewrite",)),
        (HOSTILE, ("audit:rewrite",)),
        ("names a drug", ()),
    ]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script>" not in page and page.count("&lt;script&gt;") == 2
    assert "every answer meets it" in page and "src=" not in page and "href=" not in page
    whole = (tmp_path / "out" / "samples.jsonl").read_bytes()
    (tmp_path / "out" / "samples.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    assert srrl(*common).exit_code == 0 and len(chat_server.requests) == paid
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == whole
    for second, message in (("logits", "a teacher is asked by its text"), ("shared", "is the first way")):
        with pytest.raises(InputError, match=f"--second {second}: {message}"):
            srrl(*common, "--second", second)
    with pytest.raises(InputError, match="stands in its file; leave the options out"):
        srrl(*common, "--verdict", "logits")


@pytest.mark.slow
def test_a_model_audits_its_own_answers_by_logits_too(tmp_path):
    done = srrl(
        "rubrics", "audit", WORLD / "hard.jsonl", "--model", WORLD / "checkpoint", "--out", tmp_path,
        "-n", 2, "--limit", 1, "--template", WORLD / "grader.txt", "--max-new-tokens", 48,
        "--grader-max-new-tokens", 96, "--batch", 1,
    )  # fmt: skip
    assert done.exit_code == 0 and "1 rows" in done.output
    lines = read_jsonl(tmp_path / "samples.jsonl")
    assert [line["sample"] for line in lines] == [0, 1]
    assert all(isinstance(item["second"], bool) for line in lines for item in line["criteria"])


def test_a_way_is_not_compared_with_itself(tmp_path):
    command = ("rubrics", "audit", WORLD / "hard.jsonl", "--model", WORLD / "checkpoint", "--out", tmp_path)
    with pytest.raises(InputError, match="--second generate: is the first way"):
        srrl(*command, "--second", "generate")
