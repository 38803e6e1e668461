"""The tour runs as a script, and the examples in docstrings run."""

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from srrl_jax import Grader, Qwen3, Sampler, losses
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.run import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_tour_trains_three_steps_and_plots(tmp_path):
    """In under two minutes, on two cores."""
    command = [sys.executable, str(ROOT / "scripts" / "tour.py"), "run"]
    said = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=240
    ).stdout
    assert "step 3: reward" in said and (tmp_path / "run" / "tour.png").stat().st_size > 1000
    cells = (ROOT / "scripts" / "tour.py").read_text().split("# %%")
    assert len(cells) > 10


def test_the_example_of_losses_runs():
    result = doctest.testmod(losses)
    assert result.attempted > 1 and result.failed == 0


def test_the_examples_of_model_sampler_and_grader_run():
    """One after the other, each with the names of those before it."""
    world = ROOT / "srrl_jax/tinyworld"
    names = {"checkpoint": world / "checkpoint", "template": str(world / "grader.txt")}
    names["tokenizer"] = load_tokenizer(names["checkpoint"])
    runner = doctest.DocTestRunner()
    for thing in (Qwen3, Sampler, Grader):
        test = doctest.DocTestParser().get_doctest(thing.__doc__, names, thing.__name__, None, None)
        assert len(test.examples) > 4
        assert runner.run(test, clear_globs=False).failed == 0
        names |= test.globs


@pytest.mark.slow
def test_the_example_of_train_runs(tmp_path):
    names = {"np": np, "run_dir": tmp_path / "run"}
    for example in doctest.DocTestParser().get_examples(train.__doc__):
        exec(example.source, names)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
