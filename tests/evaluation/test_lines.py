"""`srrl sample` and `srrl grade` on the embedded checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from srrl_jax import cli
from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.evaluation import lines
from srrl_jax.evaluation.judge import Runtime, open_judge
from srrl_jax.grading import GradingItem, JudgeConfig

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
MODEL = str(WORLD / "checkpoint")
GRADE = ("--template", str(WORLD / "grader.txt"), "--verdict", "logits", "--batch", "4")


@pytest.fixture
def srrl(monkeypatch):
    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["srrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code

    return run


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line + "\n" for line in (WORLD / "hard.jsonl").read_text().splitlines()[:3]))
    return path


def test_sample_then_grade_and_resume(srrl, rows, tmp_path, capsys):
    sampled, graded = tmp_path / "sampled.jsonl", tmp_path / "graded.jsonl"
    sample = ("sample", MODEL, rows, sampled, "-n", 2, "--max-new-tokens", 8, "--batch", 2)
    assert srrl(*sample) == 0
    lines = read(sampled)
    assert len(lines) == 6 and len({line["sample_id"] for line in lines}) == 6
    assert all(1 <= line["tokens"] <= 8 and line["rubrics"] for line in lines)

    whole = sampled.read_bytes()
    sampled.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"sample_id": "torn')
    assert srrl(*sample) == 0
    assert "3 new lines" in capsys.readouterr().out
    assert sampled.read_bytes() == whole
    assert srrl(*sample, "--seed", 1) == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    kept = Path(f"{sampled}.settings.json")
    settings = json.loads(kept.read_text())
    settings["identity"]["weights"] = "others"
    kept.write_text(json.dumps(settings))
    assert srrl(*sample) == 2
    assert "sampled.jsonl was made with other weights, which have changed" in capsys.readouterr().err
    del settings["identity"]  # as an older version wrote it
    kept.write_text(json.dumps(settings))
    assert srrl(*sample) == 0
    assert json.loads(kept.read_text())["identity"].keys() == {"weights", "tokenizer", "chat template"}

    assert srrl("grade", MODEL, sampled, graded, *GRADE) == 0
    result = read(graded)
    assert [line["sample_id"] for line in result] == [line["sample_id"] for line in lines]
    for line in result:
        assert [v["criterion"] for v in line["verdicts"]] == [c["criterion"] for c in line["rubrics"]]
        met = sum(v["points"] for v in line["verdicts"] if v["met"])
        assert line["reward"] == met / sum(v["points"] for v in line["verdicts"] if v["points"] > 0)
    assert srrl("grade", MODEL, sampled, graded, *GRADE) == 0
    assert "0 new lines" in capsys.readouterr().out
    kept = Path(f"{graded}.settings.json")
    assert "grader's weights" in json.loads(kept.read_text())["identity"]


def test_bad_rows_are_named_by_file_and_line(srrl, rows, tmp_path, capsys):
    assert srrl("grade", MODEL, rows, tmp_path / "out.jsonl", *GRADE) == 2
    assert "in.jsonl:1: no text to grade" in capsys.readouterr().err
    graded = json.loads(rows.read_text().splitlines()[0])
    for text, fault in (("\udfff", "holds half of a surrogate pair"), (None, "must be a string, not null")):
        (tmp_path / "bad.jsonl").write_text(json.dumps(graded | {"completion": text}))
        assert srrl("grade", MODEL, tmp_path / "bad.jsonl", tmp_path / "out.jsonl", *GRADE) == 2
        assert f"bad.jsonl:1: `completion` {fault}" in capsys.readouterr().err
    rows.write_text(rows.read_text() + '{"prompt": []}\n')
    assert srrl("sample", MODEL, rows, tmp_path / "out.jsonl") == 2
    assert "in.jsonl:4: `prompt` is empty" in capsys.readouterr().err
    assert srrl("sample", MODEL, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_what_most_lines_have_wrong_is_told_after_the_first_chunk_and_once(tmp_path, capsys):
    said = []

    def run(part):
        said.append(capsys.readouterr().err)
        for number in part:
            yield {"prompt_id": f"{number}", "response": "", "truncated": number % 2 == 0, "tokens": 1}

    out = str(tmp_path / "out.jsonl")
    shares = lines._completion_shares
    assert lines._work(out, range(12), 4, run, "tokens", lambda line: line["tokens"], shares) == 12
    assert "srrl: warning: all completions are empty. Likely cause" in said[1]
    assert "cut off" not in said[1]
    assert "empty" not in said[2] + capsys.readouterr().err


def test_a_grader_that_says_one_thing_is_told(srrl, tmp_path, capsys):
    label = {
        "prompt": [{"role": "user", "content": "hello"}],
        "completion": "hi",
        "rubric": "greets",
        "binary_labels": [True],
    }
    for name, line in (("labels", label), ("verdicts", {"criteria_met": True})):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(line) + "\n") * 20)
    command = (
        "meta-evaluate",
        tmp_path / "verdicts.jsonl",
        tmp_path / "labels.jsonl",
        "--out",
        tmp_path / "out",
    )
    assert srrl(*command) == 0
    assert "srrl: warning: all verdicts are the same. Likely cause: the grader" in capsys.readouterr().err


def test_a_checkpoint_as_judge_tells_how_far_it_is_and_computes_in_float32():
    example, waves = load_examples(WORLD / "hard.jsonl")[0], []
    config = JudgeConfig(template=str(WORLD / "grader.txt"), verdict="logits")
    with open_judge(MODEL, config, Runtime(batch=4)) as judge:
        item = GradingItem(example.prompt, "bring a book .", example.rubrics)
        (verdicts,) = judge.grade([item], lambda *wave: waves.append((*wave, precision())))
    assert waves == [(len(verdicts), len(verdicts), "highest")] and precision() is None


def precision() -> str | None:
    return jax.config.jax_default_matmul_precision


@pytest.mark.slow
def test_eight_devices_answer_and_grade_as_one_does(srrl, rows, tmp_path):
    """In a process of its own, since the number of devices is fixed when JAX starts."""
    outs = [tmp_path / f"{name}.jsonl" for name in ("sampled", "written", "logits", "bfloat16")]
    grade = ["grade", MODEL, "--template", WORLD / "grader.txt", outs[0]]
    commands = [
        ["sample", MODEL, rows, outs[0], "-n", 2, "--max-new-tokens", 8],
        [*grade, outs[1], "--max-new-tokens", 20, "--tries", 1],
        [*grade, outs[2], "--verdict", "logits"],
        [*grade, outs[3], "--verdict", "logits", "--dtype", "bfloat16"],
    ]
    for command in commands:
        assert srrl(*command) == 0
    one = [read(path) for path in outs]
    for path in outs:
        path.unlink()
    child = """import json, sys
from typer.testing import CliRunner
from srrl_jax.cli import app
for command in json.loads(sys.argv[1]):
    CliRunner().invoke(app, [*command, "--mesh", "data=2,fsdp=2,tensor=2"], catch_exceptions=False)
"""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", child, json.dumps([list(map(str, command)) for command in commands])],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    eight = [read(path) for path in outs]
    assert eight[:2] == one[:2]  # to the letter
    assert len({line["response"] for line in one[0]}) > 1
    chances = [
        [[v["probability"] for line in lines for v in line["verdicts"]] for lines in given[2:]]
        for given in (one, eight)
    ]
    (float32, bfloat16), (float32_of_eight, bfloat16_of_eight) = chances
    assert float32_of_eight == pytest.approx(float32, abs=1e-4)
    assert bfloat16_of_eight == pytest.approx(bfloat16, abs=0.05)
    assert bfloat16 != float32 and bfloat16 == pytest.approx(float32, abs=0.2)


def test_an_out_of_other_rows_is_refused_and_further_rows_are_not(tmp_path):
    def rows(*contents):
        return [(f"p{i}:{i}", {"prompt": [{"content": text}]}, None) for i, text in enumerate(contents)]

    out, settings = tmp_path / "out.jsonl", {"command": "sample"}
    assert lines._open(str(out), settings, rows("a", "b")) == []
    out.write_text(json.dumps({"sample_id": "p0:0:3", "prompt": [{"content": "a"}]}) + "\n")
    assert len(lines._open(str(out), settings, rows("a", "b", "c"))) == 1
    with pytest.raises(InputError, match="out.jsonl: the rows of its lines have changed since: p0:0"):
        lines._open(str(out), settings, rows("another", "b"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: out.mkdir(), "is a directory"),
        (lambda out: out.write_text("{}\n"), "but not out.jsonl.settings.json"),
        (
            lambda out: out.write_text("") or Path(f"{out}.settings.json").write_text("{broken"),
            "out.jsonl.settings.json: not valid JSON",
        ),
    ],
)
def test_an_out_that_is_none_is_told(srrl, rows, tmp_path, capsys, spoil, message):
    out = tmp_path / "there" / "out.jsonl"
    out.parent.mkdir()
    spoil(out)
    assert srrl("sample", MODEL, rows, out) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_out_under_a_file_is_told(srrl, rows, capsys):
    assert srrl("sample", MODEL, rows, rows / "out.jsonl") == 2
    assert "cannot write there" in capsys.readouterr().err
