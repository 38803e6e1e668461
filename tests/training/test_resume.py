"""A run that was stopped, at its end or in the midst of a step, goes on as if it had not been."""

import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import train
from srrl_jax.training.checkpoint import Checkpoints, Position

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (
    f"data.eval={ROOT / 'srrl_jax/tinyworld/hard.jsonl'}",
    "eval.rows=2",
    "eval.every=2",
    "checkpoint.every=2",
    "checkpoint.keep=5",
    "optimizer.minibatches=2",
    "optimizer.learning_rate=0.001",
    "kl_coef=0.1",
)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return run_dir, train(recipe(run_dir, *RECIPE, "steps=4"))


def assert_same_weights(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_logs(one, other):
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


class Tracker:
    """A tracker of a user's own, whose service fails at step 3."""

    heard: list = []

    def __init__(self, run_dir, config, id):
        self.id = id or "first"
        self.heard.append((self.id if id else None, config["seed"]))

    def write(self, step, metrics, samples):
        if step == 3:
            raise ConnectionError("no route")
        self.heard.append((step, len(samples), {"lr", "time/rollout"} <= metrics.keys()))

    def close(self, failed):
        self.heard.append(failed)


def test_a_run_in_two_parts_writes_what_a_run_in_one_writes(recipe, uninterrupted, tmp_path, monkeypatch):
    """And its tracker hears of each step once, in the same tracked run; that it fails is told of."""
    monkeypatch.setitem(sys.modules, "of_mine", types.SimpleNamespace(Tracker=Tracker))
    run_dir, state = uninterrupted
    train(recipe(tmp_path, *RECIPE, "steps=2", "trackers=[of_mine:Tracker]"))
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    resumed = train(recipe(tmp_path, *RECIPE, "steps=4", "trackers=[of_mine:Tracker]"))
    assert Tracker.heard == [
        *((None, 0), (0, 2, False), (1, 4, True), (2, 6, True), False),
        *(("first", 0), (4, 6, True), False),
    ]
    warnings = [row["message"] for row in read_jsonl(tmp_path / "events.jsonl") if row["event"] == "warning"]
    assert warnings == ["tracker of_mine:Tracker has not got step 3: ConnectionError: no route"]
    assert_same_logs(tmp_path, run_dir)
    assert_same_weights(resumed, state)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_killed_run_goes_on_from_its_last_checkpoint(recipe, uninterrupted, tmp_path):
    """SIGKILL in step 4, when the log already has step 3 and the last checkpoint is of step 2."""
    config = recipe(tmp_path, *RECIPE, "steps=4")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(config.to_dict()))
    child = """
import sys, time
from srrl_jax.telemetry import RunLog
from srrl_jax.training import TrainConfig, train
write = RunLog.write
def slow(self, step, *rest):
    write(self, step, *rest)
    time.sleep(600 if step == 3 else 0)
RunLog.write = slow
train(TrainConfig.load(sys.argv[1]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c" + child, str(recipe_file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics, checkpoint = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "2"
    try:
        end = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") == 4 and checkpoint.exists()):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < end, "the child did not come to step 3"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with metrics.open("ab") as file:
        file.write(b'{"step": 4, "rew')  # a line cut short by the kill

    run_dir, state = uninterrupted
    resumed = train(config)
    assert_same_logs(tmp_path, run_dir)
    assert_same_weights(resumed, state)


def test_a_checkpoint_holds_weights_optimizer_and_position(recipe, uninterrupted):
    run_dir, state = uninterrupted
    config = recipe(run_dir, *RECIPE, "steps=4")
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        position, stored = checkpoints.restore(4, like=state)
        earlier_position, earlier = checkpoints.restore(2, like=state)
    assert (position, earlier_position) == (Position(4, 0, 8), Position(2, 0, 4))
    assert_same_weights(stored, state)
    with pytest.raises(AssertionError):
        assert_same_weights(earlier.params, state.params)
    counts = [int(leaf) for leaf in jax.tree.leaves(stored.opt_state) if leaf.ndim == 0]
    assert set(counts) == {8}  # two minibatches a step


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate was 0.001, now 0.5"),
        ("seed=3", "seed was 0, now 3"),
        ("grading.tries=1", "grading.tries was 2, now 1"),
    ],
)
def test_another_recipe_is_refused_with_its_difference(recipe, logs, uninterrupted, override, difference):
    run_dir, _ = uninterrupted
    before = logs(run_dir), (run_dir / "config.yaml").read_text()
    with pytest.raises(InputError) as error:
        train(recipe(run_dir, *RECIPE, "steps=4", override))
    assert f"{run_dir} holds a run of another recipe: {difference}. " in str(error.value)
    assert (logs(run_dir), (run_dir / "config.yaml").read_text()) == before


def test_a_finished_run_is_left_as_it_is(recipe, uninterrupted):
    run_dir, state = uninterrupted
    files = [run_dir / "metrics.jsonl", run_dir / "samples.jsonl"]
    before = [file.read_bytes() for file in files]
    again = train(recipe(run_dir, *RECIPE, "steps=4"))
    assert [file.read_bytes() for file in files] == before
    assert_same_weights(again, state)
