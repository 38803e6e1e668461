"""A run killed with SIGKILL at random points, twenty times, is the run that was never killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from srrl_jax.run.checkpoint import Checkpoints
from srrl_jax.telemetry import read_jsonl

pytestmark = pytest.mark.slow

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
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
# In which parts the kills are: each part twice, and six more; five kills a test, on one run or several.
_chance = random.Random(5)
PLAN = [*PARTS, *PARTS, *_chance.choices(list(PARTS), k=6)]
_chance.shuffle(PLAN)

# Trains, and says which part begins.
CHILD = """
import contextlib, sys
from srrl_jax.telemetry import RunLog
from srrl_jax.run import train
from srrl_jax.training import TrainConfig
from srrl_jax.run.session import Session
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


@pytest.fixture(scope="module")
def start(recipe, tmp_path_factory):
    """Starts or resumes a run in a process: (run_dir) -> Popen, with parts on stdout."""
    rows = (WORLD / "easy.jsonl").read_text().splitlines(keepends=True)[:5]
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "rows.jsonl").write_text("".join(rows))  # an epoch ends in every third step

    def run(run_dir: Path) -> subprocess.Popen:
        config = recipe(
            run_dir,
            f"data.train={folder / 'rows.jsonl'}",
            f"data.eval={WORLD / 'hard.jsonl'}",
            "steps=10",
            "eval.rows=2",
            "eval.every=3",
            "checkpoint.every=2",
            "optimizer.minibatches=2",
            "optimizer.learning_rate=0.001",
            "kl_coef=0.1",
        )
        path = folder / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        return subprocess.Popen(
            [sys.executable, "-c" + CHILD, str(path)],
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


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The directory of the run that was never killed."""
    run_dir = tmp_path_factory.mktemp("whole") / "whole"
    finish(start(run_dir))
    assert {row["data/epoch"] for row in read_jsonl(run_dir / "metrics.jsonl")[1:]} >= {2.0, 2.4}
    return run_dir


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error


@pytest.mark.parametrize("first", range(0, len(PLAN), 5))
def test_kills(start, whole, recipe, tmp_path, first):
    plan, chance, finished = PLAN[first : first + 5], random.Random(first), 0
    end = time.monotonic() + 900
    while plan:
        run_dir = tmp_path / f"killed{finished}"
        while plan:
            assert time.monotonic() < end, f"{len(plan)} kills are left"
            part = plan[-1]
            if not kill_in(start(run_dir), part, chance.randint(1, 3), chance.uniform(0, PARTS[part])):
                break
            plan.pop()
        else:
            finish(start(run_dir))
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
        assert {path.name for path in (run_dir / "tokens").iterdir()} == {
            path.name for path in (whole / "tokens").iterdir()
        }
        assert_same_weights(whole, run_dir, recipe)
        finished += 1


def test_the_plan_kills_twenty_times_and_in_every_part():
    assert len(PLAN) == 20 and set(PLAN) == set(PARTS)


def assert_same_weights(one: Path, other: Path, recipe) -> None:
    """By the fingerprint that the last checkpoint holds of all its arrays."""
    texts = []
    for run_dir in (one, other):
        with Checkpoints(run_dir, recipe(run_dir).checkpoint, read_only=True) as checkpoints:
            # A kill may leave an older one, until the next is saved.
            assert checkpoints.steps()[-2:] == [8, 10]
        texts.append((run_dir / "checkpoints" / "10" / "position" / "metadata").read_text())
    assert texts[0] == texts[1] and "fingerprint" in texts[0]
