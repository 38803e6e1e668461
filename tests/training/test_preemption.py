"""SIGTERM: saved at a safe point, or ended in time without. SIGINT: saved after the step, or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from srrl_jax.run import train
from srrl_jax.run.preemption import EXIT_CODE, Interrupted, Preempted, Preemption
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import loop

from .conftest import FOUR


@pytest.mark.parametrize(
    ("number", "check", "kind", "code"),
    [
        (signal.SIGTERM, "check", Preempted, EXIT_CODE),
        (signal.SIGINT, "check_between_steps", Interrupted, 130),
    ],
)
def test_check_raises_only_after_the_signal_and_the_handler_is_put_back(number, check, kind, code):
    before, told = signal.getsignal(number), []
    with pytest.raises(kind) as raised, Preemption(60, pytest.fail, lambda: told.append(1)) as preemption:
        getattr(preemption, check)()
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            getattr(preemption, check)()
            time.sleep(0.01)
    assert raised.value.code == code
    assert told == [1] * (number == signal.SIGINT)
    assert signal.getsignal(number) is before


def test_without_a_safe_point_the_process_ends_in_time():
    """The main thread is in a long computation in C, where Python's own handlers do not run; and the log
    cannot be written."""
    child = """
import os, signal, sys, threading, time
import numpy as np
from srrl_jax.run.preemption import Preemption
def kill():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
def tell():
    print("no safe point", flush=True)
    raise OSError("disk full")
with Preemption(0.5, tell, None):
    threading.Thread(target=kill).start()
    np.linalg.svd(np.random.default_rng(0).normal(size=(6000, 6000)))
print("came to its end")
"""
    start = time.monotonic()
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (process.returncode, process.stdout) == (EXIT_CODE, "no safe point\n")
    assert "disk full" in process.stderr
    assert time.monotonic() - start < 60


def test_a_second_sigint_leaves_at_once():
    child = """
import os, signal, threading
from srrl_jax.run.preemption import Preemption
told = threading.Event()
with Preemption(60, None, told.set) as preemption:
    preemption.check_between_steps()
    os.kill(os.getpid(), signal.SIGINT)
    assert told.wait(10)
    preemption.check()  # the step goes on
    print("told", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(60)
print("came to its end")
"""
    process = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (130, "told\n"), process.stderr


@pytest.mark.parametrize(
    ("number", "step", "saved"),
    [
        (signal.SIGTERM, 3, 2),
        pytest.param(signal.SIGTERM, 1, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_saves_what_is_done_and_goes_on_to_the_same_end(
    recipe, finished, tmp_path, monkeypatch, capsys, number, step, saved
):
    """A signal in the rollout of `step`, when there is no periodical checkpoint."""
    whole, _ = finished
    config = recipe(tmp_path / "cut", *FOUR, "checkpoint.every=4", "checkpoint.preemption_seconds=60")
    asked, rows = [], loop.step_rows

    def preempt(*args):
        if args[2] == step - 1 and not asked:
            asked.append(step)
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the watching thread hears
        return rows(*args)

    monkeypatch.setattr(loop, "step_rows", preempt)
    with pytest.raises(Preempted):
        train(config)
    checkpoints = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert checkpoints == ([] if saved is None else [str(saved)])
    event = read_jsonl(tmp_path / "cut" / "events.jsonl")[-1]
    kind = "interrupted" if number == signal.SIGINT else "preempted"
    assert (event["event"], event["step"]) == (kind, saved or 0)
    assert ("finished and saved first" in capsys.readouterr().out) == (number == signal.SIGINT)
    train(config)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
