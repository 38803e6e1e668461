"""A run killed with SIGKILL at random points, twenty times, is the run that was never killed."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from srrl_jax.telemetry import read_jsonl
from srrl_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
KILLS = 20
# Longest delay after a part has begun; each takes about as long, on one slow core.
PARTS = {
    "rollout": 0.3,
    "grade": 0.3,
    "logprob": 0.1,
    "update": 0.4,
    "eval": 0.4,
    "write": 0.02,
    "checkpoint": 0.5,
}

# Trains, and says which part begins.
CHILD = """
import contextlib, sys
import jax
from srrl_jax.telemetry import RunLog
from srrl_jax.training import TrainConfig, train
from srrl_jax.training.session import Session
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
phase, write = Session.phase, RunLog.write
@contextlib.contextmanager
def told_phase(self, name):
    print(name, flush=True)
    with phase(self, name) as progress:
        yield progress
def told_write(self, *args):
    print("write", flush=True)
    write(self, *args)
Session.phase, RunLog.write = told_phase, told_write
train(TrainConfig.load(sys.argv[1]))
"""


@pytest.fixture
def start(recipe, program_cache, tmp_path):
    """Starts or resumes a run in a process: (run_dir) -> Popen, with parts on stdout."""
    rows = (WORLD / "easy.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "rows.jsonl").write_text("".join(rows))  # an epoch ends in every third step

    def run(run_dir: Path) -> subprocess.Popen:
        config = recipe(
            run_dir,
            f"data.train={tmp_path / 'rows.jsonl'}",
            f"data.eval={WORLD / 'hard.jsonl'}",
            "steps=10",
            "eval.rows=2",
            "eval.every=3",
            "checkpoint.every=2",
            "optimizer.minibatches=2",
            "optimizer.learning_rate=0.001",
            "kl_coef=0.1",
        )
        path = tmp_path / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(program_cache)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def kill_in(process: subprocess.Popen, part: str, nth: int, delay: float) -> bool:
    """Kills the process so long after the part began the nth time; False where it ended before."""
    try:
        for line in process.stdout:
            nth -= line.strip() == part
            if nth == 0:
                time.sleep(delay)
                process.kill()  # nothing, where it has ended
                break
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        return process.returncode != 0
    finally:
        process.kill()
        process.communicate()


def test_twenty_kills(start, recipe, tmp_path):
    whole = tmp_path / "whole"
    _, error = (process := start(whole)).communicate()
    assert process.returncode == 0, error
    expected = [(whole / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    assert {row["data/epoch"] for row in read_jsonl(whole / "metrics.jsonl")[1:]} >= {2.0, 2.4}

    chance, killed, finished = random.Random(5), Counter(), 0
    plan = [*PARTS, *PARTS, *chance.choices(list(PARTS), k=KILLS - 2 * len(PARTS))]
    chance.shuffle(plan)
    end = time.monotonic() + 480
    while plan:
        run_dir = tmp_path / f"killed{finished}"
        while plan and time.monotonic() < end:
            part = plan[-1]
            if not kill_in(start(run_dir), part, chance.randint(1, 3), chance.uniform(0, PARTS[part])):
                break
            killed[plan.pop()] += 1
        else:
            _, error = (process := start(run_dir)).communicate()
            assert process.returncode == 0, error
        assert time.monotonic() < end, f"only {killed} kills in the time"
        found = [(run_dir / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
        assert found == expected
        assert {path.name for path in (run_dir / "tokens").iterdir()} == {
            path.name for path in (whole / "tokens").iterdir()
        }
        assert_same_weights(whole, run_dir, recipe)
        finished += 1
    assert killed.total() == KILLS and set(killed) == set(PARTS)


def assert_same_weights(one: Path, other: Path, recipe) -> None:
    """By the fingerprint that the last checkpoint holds of all its arrays."""
    texts = []
    for run_dir in (one, other):
        with Checkpoints(run_dir, recipe(run_dir).checkpoint, read_only=True) as checkpoints:
            # A kill may leave an older one, until the next is saved.
            assert checkpoints.steps()[-2:] == [8, 10]
        texts.append((run_dir / "checkpoints" / "10" / "position" / "metadata").read_text())
    assert texts[0] == texts[1] and "fingerprint" in texts[0]
