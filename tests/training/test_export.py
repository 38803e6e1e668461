"""A checkpoint of a run as a directory that transformers loads."""

import sys

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax import cli
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.training.checkpoint import Checkpoints, Position, TrainState
from srrl_jax.training.export import export, exported
from srrl_jax.training.run import write_config
from srrl_jax.training.update import make_optimizer


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A run directory with checkpoints of steps 2 and 4, and the weights of each."""
    run_dir = tmp_path_factory.mktemp("run")
    config = recipe(run_dir, "checkpoint.keep=5")
    write_config(config, {"rows": "their hash"})
    start, optimizer = nnx.state(Qwen3.from_pretrained(config.model)), make_optimizer(config.optimizer)
    params = {step: jax.tree.map(lambda x, step=step: x * (1 + step / 10), start) for step in (2, 4)}
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        for step, weights in params.items():
            checkpoints.save(Position(step, 0, step), TrainState(weights, optimizer.init(weights)), {})
    return run_dir, params


def assert_holds(out, params):
    leaves = jax.tree.leaves(nnx.state(Qwen3.from_pretrained(out)))
    for left, right in zip(leaves, jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_newest_step_or_the_one_asked_for(run, tmp_path):
    run_dir, params = run
    assert export(run_dir, tmp_path / "newest") == 4
    assert export(run_dir, tmp_path / "second", step=2) == 2
    assert_holds(tmp_path / "newest", params[4])
    assert_holds(tmp_path / "second", params[2])
    assert load_tokenizer(tmp_path / "newest").decode([300]) != ""


def test_the_command(run, tmp_path, monkeypatch, capsys):
    run_dir, params = run
    out = tmp_path / "out"
    for step, options in ((4, []), (2, ["--step", "2"])):
        command = ["srrl", "export", str(run_dir), str(out / str(step)), "--dtype", "bfloat16", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code and capsys.readouterr().out == f"step {step}: {out / str(step)}\n"
        rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params[step])
        assert_holds(out / str(step), rounded)


def test_what_is_refused(run, tmp_path, recipe):
    run_dir, _ = run
    with pytest.raises(InputError, match="no checkpoint of step 3; there are 2, 4"):
        export(run_dir, tmp_path / "out", step=3)
    with pytest.raises(InputError, match=f"{tmp_path}: no run is there"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match=f"{taken}: exists and is not an empty directory"):
            export(run_dir, taken)
    write_config(recipe(tmp_path / "young"))
    with pytest.raises(InputError, match="no checkpoint yet"):
        export(tmp_path / "young", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_directory_stands_for_its_policy(run):
    run_dir, params = run
    assert exported(f"{run_dir}@2") == str(run_dir / "export" / "2")
    assert exported(str(run_dir)) == exported(f"{run_dir}@4") == str(run_dir / "export" / "4")
    assert_holds(run_dir / "export" / "2", params[2])
    assert_holds(run_dir / "export" / "4", params[4])
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "checkpoints", "export"}
    for other in ("owner/name", "policy", str(run_dir / "export" / "4"), "name@2"):
        assert exported(other) == other
    with pytest.raises(InputError, match="no checkpoint of step 3; there are 2, 4"):
        exported(f"{run_dir}@3")
