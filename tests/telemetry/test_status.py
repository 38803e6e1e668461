"""`srrl status`: where a run stands, told from its directory."""

import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from srrl_jax.errors import InputError
from srrl_jax.telemetry import RunLog
from srrl_jax.telemetry.status import read_status, status_table


@pytest.fixture(params=["disk", "store"])
def run_dir(request, tmp_path):
    """A run that has done 3 of 10 steps of 40 s and grades the fourth's completions."""
    folder = request.getfixturevalue("bucket") / "run" if request.param == "store" else tmp_path / "run"
    log = RunLog(folder)
    (folder / "config.yaml").write_text("model: Qwen/Qwen3-8B\nsteps: 10\n")
    log.event(0, "start", "10 steps")
    for step in (1, 2, 3):
        log.write(step, {"reward/mean": step / 10}, [], {"time/rollout": 30.0, "time/grade": 10.0})
    log.event(3, "warning", "no variance")
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "checkpoints" / "2" / "x").write_text("")
    log.progress(3, "grade", "24/128")
    return folder


def found(run_dir, later: float = 0) -> dict:
    return read_status(run_dir, datetime.now(UTC) + timedelta(seconds=later))


def screen(run_dir, later: float = 0) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(status_table(found(run_dir, later)))
    assert len(out.getvalue().splitlines()) < 24
    return " ".join(out.getvalue().split())


def test_a_run_is_seen_on_one_screen(run_dir):
    shown = screen(run_dir, later=20)
    for text in (
        "(Qwen/Qwen3-8B)",
        "running: grading 24/128, last sign 2",
        "3 of 10 (30%)",
        "40 s a step, so about 4 min 40 s left",
        "reward 0.30",
        "warning step 3: no variance",
        "checkpoints 2",
    ):
        assert text in shown


def test_other_programs_read_the_same(run_dir):
    told = json.loads(json.dumps(found(run_dir, later=20)))
    assert (told["step"], told["steps"], told["checkpoints"]) == (3, 10, [2])
    assert (told["seconds_per_step"], told["seconds_left"]) == (40.0, 280.0)
    assert told["latest"] == {"reward/mean": 0.3} and told["events"][0]["message"] == "no variance"
    assert told["state"].startswith("running: grading 24/128")


def test_a_run_without_a_sign_is_called_silent(run_dir):
    assert "running" in screen(run_dir, later=100)
    assert "silent while grading 24/128, last sign 10 min" in screen(run_dir, later=600)


@pytest.mark.parametrize("kind", ["preempted", "interrupted", "failed"])
def test_a_run_that_ended_early_says_how(run_dir, kind):
    RunLog(run_dir).event(3, kind, "SIGTERM")
    shown = screen(run_dir, later=9)
    assert f"{kind}, last sign" in shown and "run the same command to go on" in shown


def test_a_finished_run_says_so(run_dir):
    RunLog(run_dir).write(10, {"eval/self": 0.5}, [], {})
    shown = screen(run_dir, later=9000)
    assert "finished, last sign 2 h 30 min ago" in shown
    assert "10 of 10 (100%)" in shown and "left" not in shown


def test_a_broken_file_is_named(run_dir):
    (run_dir / "progress.json").write_text("{")
    with pytest.raises(InputError, match=r"progress.json: not JSON .*; delete it"):
        found(run_dir)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run is here"):
        read_status(tmp_path)
