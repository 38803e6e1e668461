"""`srrl sample` and `srrl grade` on the embedded checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from srrl_jax import cli

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

    assert srrl("grade", MODEL, sampled, graded, *GRADE) == 0
    result = read(graded)
    assert [line["sample_id"] for line in result] == [line["sample_id"] for line in lines]
    for line in result:
        assert [v["criterion"] for v in line["verdicts"]] == [c["criterion"] for c in line["rubrics"]]
        met = sum(v["points"] for v in line["verdicts"] if v["met"])
        assert line["reward"] == met / sum(v["points"] for v in line["verdicts"] if v["points"] > 0)
    assert srrl("grade", MODEL, sampled, graded, *GRADE) == 0
    assert "0 new lines" in capsys.readouterr().out


def test_bad_rows_are_named_by_file_and_line(srrl, rows, tmp_path, capsys):
    assert srrl("grade", MODEL, rows, tmp_path / "out.jsonl", *GRADE) == 2
    assert "in.jsonl:1: no text to grade" in capsys.readouterr().err
    rows.write_text(rows.read_text() + '{"prompt": []}\n')
    assert srrl("sample", MODEL, rows, tmp_path / "out.jsonl") == 2
    assert "in.jsonl:4: `prompt` is empty" in capsys.readouterr().err
    assert srrl("sample", MODEL, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
