"""A run that was stopped, at its end or in the midst of a step, goes on as if it had not been."""

import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.run import train
from srrl_jax.run.checkpoint import Checkpoints, Position
from srrl_jax.telemetry import read_jsonl

from .conftest import FOUR


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


@pytest.mark.slow
def test_a_run_in_two_parts_writes_what_a_run_in_one_writes(recipe, finished, tmp_path, monkeypatch):
    """And its tracker hears of each step once, in the same tracked run; that it fails is told of."""
    monkeypatch.setitem(sys.modules, "of_mine", types.SimpleNamespace(Tracker=Tracker))
    run_dir, state = finished
    train(recipe(tmp_path, *FOUR, "steps=2", "trackers=[of_mine:Tracker]"))
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    resumed = train(recipe(tmp_path, *FOUR, "trackers=[of_mine:Tracker]"))
    assert Tracker.heard == [
        *((None, 0), (0, 2, False), (1, 4, True), (2, 6, True), False),
        *(("first", 0), (4, 6, True), False),
    ]
    warnings = [row["message"] for row in read_jsonl(tmp_path / "events.jsonl") if row["event"] == "warning"]
    assert warnings == ["tracker of_mine:Tracker has not got step 3: ConnectionError: no route"]
    assert_same_logs(tmp_path, run_dir)
    assert_same_weights(resumed, state)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_killed_run_goes_on_from_its_last_checkpoint(recipe, finished, tmp_path):
    """As SIGKILL in step 4 leaves it: the logs are ahead of the checkpoint of step 2, their last line cut.

    Processes are really killed in test_kills.py, which is slow.
    """
    run_dir, state = finished
    killed = Path(shutil.copytree(run_dir, tmp_path / "killed"))
    shutil.rmtree(killed / "checkpoints" / "4")
    metrics = killed / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    resumed = train(recipe(killed, *FOUR))
    assert_same_logs(killed, run_dir)
    assert_same_weights(resumed, state)


def test_a_checkpoint_holds_weights_optimizer_and_position(recipe, finished):
    run_dir, state = finished
    config = recipe(run_dir, *FOUR)
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
def test_another_recipe_is_refused_with_its_difference(recipe, logs, finished, override, difference):
    run_dir, _ = finished
    before = logs(run_dir), (run_dir / "config.yaml").read_text()
    with pytest.raises(InputError) as error:
        train(recipe(run_dir, *FOUR, override))
    assert f"{run_dir} holds a run of another recipe: {difference}. " in str(error.value)
    assert (logs(run_dir), (run_dir / "config.yaml").read_text()) == before


def test_a_finished_run_is_left_as_it_is(recipe, finished):
    run_dir, state = finished
    files = [run_dir / "metrics.jsonl", run_dir / "samples.jsonl"]
    before = [file.read_bytes() for file in files]
    again = train(recipe(run_dir, *FOUR))
    assert [file.read_bytes() for file in files] == before
    assert_same_weights(again, state)
