"""Updates that are not finite, and steps that teach nothing."""

import jax
import numpy as np
import pytest
from etils import epath

from srrl_jax.errors import InputError
from srrl_jax.models import TreeBatch
from srrl_jax.run import train
from srrl_jax.run.checkpoint import Checkpoints
from srrl_jax.run.guards import SkippedUpdates, new_warnings
from srrl_jax.telemetry import read_jsonl
from srrl_jax.telemetry.signs import SIGNS
from srrl_jax.training import rewards
from srrl_jax.training.batch import UpdateBatch

RECIPE = ("checkpoint.every=1", "checkpoint.keep=5")


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_is_told_once_an_occurrence(name):
    history = [{name: value} for value in (0.5, 1.0, 1.0, 0.9, 1.0)]
    told = [len(new_warnings(now, before)) for before, now in zip([{}, *history], history, strict=False)]
    assert told == [0, 1, 0, 0, 1]
    what, cause = SIGNS[name]
    assert new_warnings({name: 1}, {}) == [f"all {what}. Likely cause: {cause}"]


def batch():
    tree = TreeBatch(np.zeros((1, 2), int), np.ones(1, int), np.zeros((1, 2, 3), int), np.ones((1, 2), int))
    per_token = np.ones((1, 2, 3))
    return UpdateBatch(
        tree, per_token > 0, per_token, per_token, np.full((1, 2), np.nan), per_token, per_token[..., 0] > 0
    )


def test_a_finite_update_ends_a_row_of_skipped_ones(tmp_path):
    skips = SkippedUpdates(epath.Path(tmp_path), limit=2)
    for flags in ([1.0], [0.0], [1.0]):
        written = skips.note(
            1, [{"guard/skipped_updates": np.float32(f)} for f in flags], [batch()] * len(flags)
        )
        assert len(written) == sum(flags)
        skips.check()
    assert (skips.total, skips.in_a_row) == (2, 1)
    skips.note(2, [{"guard/skipped_updates": 1.0}], [batch()])
    with pytest.raises(InputError, match="2 updates in a row"):
        skips.check()


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the advantages of given steps NaN: (steps) -> None."""

    def spoil(*steps):
        calls, advantages = [], rewards.group_advantages

        def spy(*args):
            calls.append(len(calls) + 1)
            found = advantages(*args)
            return found * np.nan if calls[-1] in steps else found

        monkeypatch.setattr(rewards, "group_advantages", spy)

    return spoil


def weights(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_step_without_finite_loss_changes_nothing(recipe, spoilt, tmp_path):
    spoilt(2)
    end = train(recipe(tmp_path, *RECIPE, "steps=3"))
    with Checkpoints(tmp_path, recipe(tmp_path, *RECIPE).checkpoint, read_only=True) as checkpoints:
        first, second = (weights(checkpoints.restore(step, like=end)[1]) for step in (1, 2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(second, weights(end), strict=True))  # and it goes on
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["guard/skipped_updates"] for row in metrics] == [0, 2, 0]
    assert metrics[1]["loss"] is None and np.isfinite(metrics[1]["reward/mean"])
    files = sorted((tmp_path / "skipped").iterdir())
    assert [file.name for file in files] == ["step_000002_update_0.npz", "step_000002_update_1.npz"]
    with np.load(files[0]) as fields:
        assert np.isnan(fields["advantages"]).all() and fields["branches"].shape == fields["logprobs"].shape
    events = [row for row in read_jsonl(tmp_path / "events.jsonl") if row["event"] == "skipped update"]
    assert len(events) == 2 and str(files[0]) in events[0]["message"]


@pytest.mark.slow
def test_too_many_skipped_updates_in_a_row_end_the_run_over_a_resume_too(recipe, spoilt, tmp_path):
    spoilt(1, 2)
    train(recipe(tmp_path, *RECIPE, "steps=1", "optimizer.max_skipped=3"))  # two of step 1
    with pytest.raises(InputError, match=r"4 updates in a row .*optimizer\.max_skipped is 3"):
        train(recipe(tmp_path, *RECIPE, "steps=9", "optimizer.max_skipped=3"))
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_step_in_vain_is_told_with_its_likely_cause(recipe, tmp_path, capsys):
    train(recipe(tmp_path, "steps=2"), grader=lambda _, __, criteria: [None] * len(criteria))
    events = [row for row in read_jsonl(tmp_path / "events.jsonl") if row["event"] == "warning"]
    assert [row["step"] for row in events] == [1, 1]  # not again in step 2
    shown = capsys.readouterr().out
    for event, key in zip(events, ("grading", "rollout.sampling"), strict=True):
        assert key in event["message"] and event["message"] in shown
