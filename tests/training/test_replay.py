"""`srrl replay`: a step computed again from the logs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from srrl_jax import cli
from srrl_jax.errors import InputError
from srrl_jax.run.replay import replay
from srrl_jax.run.tokens import tokens_path


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the finished run to tamper with."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def differing(run_dir, step) -> list[str]:
    return [row.name for row in replay(run_dir, step)[0] if row.verdict != "same"]


@pytest.mark.parametrize(("step", "start"), [pytest.param(2, 0, marks=pytest.mark.slow), (3, 2)])
def test_every_step_is_the_same_to_the_bit(finished, step, start):
    run_dir, _ = finished
    found, started = replay(run_dir, step)
    assert [row for row in found if row.verdict != "same"] == []
    logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[step])
    # Verdicts on controls are not kept in the logs, so nothing computes their rates again.
    again = {name for name in logged if not name.startswith("grader/control_met_rate")}
    assert {row.name for row in found} >= again - {"step", "lr"}
    assert started == start


def rewrite(path, step, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines:
        if row["step"] == step:
            change(row)
            break
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


@pytest.mark.slow
def test_a_changed_verdict_shows_in_all_that_follows_from_it(run_dir):
    def turn(row):
        criterion = next(c for c in row["criteria"] if c["points"] > 0)
        criterion["verdict"] = not criterion["verdict"]

    rewrite(run_dir / "samples.jsonl", 3, turn)
    names = differing(run_dir, 3)
    assert {"reward 0.0", "advantage 0.0", "reward/mean", "loss"} <= set(names)


@pytest.mark.slow
def test_changed_tokens_show(run_dir):
    path = tokens_path(run_dir, 3)
    with np.load(path) as file:
        fields = dict(file)
    fields["tokens"][0] += 1
    np.savez_compressed(path, **fields)
    names = differing(run_dir, 3)
    assert "completion 0.0" in names and "loss" in names


@pytest.mark.parametrize("more", [0.01, pytest.param(0.0, marks=pytest.mark.slow)])
def test_the_command_prints_a_table_and_fails_on_a_difference(run_dir, monkeypatch, capsys, more):
    rewrite(run_dir / "metrics.jsonl", 4, lambda row: row.update(kl=row["kl"] + more))
    monkeypatch.setattr(sys, "argv", ["srrl", "replay", str(run_dir), "--step", "4"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    text = capsys.readouterr().out
    assert exit.value.code == text.count("DIFFERS") == (more > 0)
    assert "loss" in text and "kl" in text


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_is_not_there(finished, step):
    with pytest.raises(InputError, match=f"no training step {step}; the last one is 4"):
        replay(finished[0], step)


@pytest.mark.slow
def test_files_that_are_missing_are_named(run_dir, tmp_path):
    tokens_path(run_dir, 1).unlink()
    with pytest.raises(InputError, match=r"step 1 cannot be computed again without .*step_000001\.npz"):
        replay(run_dir, 2)
    with pytest.raises(InputError, match=r"no config\.yaml there"):
        replay(tmp_path / "none", 1)
