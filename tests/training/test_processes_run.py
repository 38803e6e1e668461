"""`srrl train` in two processes of four devices: the run of one process, and what ends one ends both."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from srrl_jax.parallel.processes import HEARTBEAT_SECONDS
from srrl_jax.telemetry import read_jsonl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def start(recipe, tmp_path_factory):
    """Starts `srrl train` in processes over loopback: (run_dir, devices of each, *overrides) -> Popens.

    `each` holds overrides of each process.
    """
    started = []

    def begin(run_dir: Path, devices: list[int], *overrides: str, each=([], [])) -> list[subprocess.Popen]:
        config = recipe(
            run_dir,
            "prompts_per_step=8",
            "optimizer.minibatches=1",
            "optimizer.microbatch=8",
            "optimizer.warmup_steps=0",
            "checkpoint.every=1",
            "checkpoint.keep=9",
            *overrides,
        )
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        command = [
            sys.executable,
            "-c",
            "from srrl_jax.cli import main; main()",
            "train",
            str(path),
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        for number, count in enumerate(devices):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(count),
                "PYTHONPATH": str(ROOT),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # as in the runs whose numbers these stand for
            }
            if len(devices) > 1:
                environment |= {
                    "SRRL_COORDINATOR": coordinator,
                    "SRRL_PROCESSES": str(len(devices)),
                    "SRRL_PROCESS": str(number),
                }
            with (run_dir.parent / f"{run_dir.name}-{number}.txt").open("a") as file:
                process = subprocess.Popen(
                    [*command, *each[number]], env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            started.append(process)
        return started[-len(devices) :]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def output(run_dir: Path, number: int) -> str:
    return (run_dir.parent / f"{run_dir.name}-{number}.txt").read_text()


def finish(run_dir: Path, processes: list[subprocess.Popen]) -> None:
    for number, process in enumerate(processes):
        assert process.wait(timeout=900) == 0, output(run_dir, number)


def wait_for_step(step: int, run_dir: Path, processes: list[subprocess.Popen]) -> None:
    """Returns when the checkpoint of `step` is complete."""
    end = time.monotonic() + 900
    while not (run_dir / "checkpoints" / str(step)).exists():
        assert all(process.poll() is None for process in processes), output(run_dir, 0)
        assert time.monotonic() < end, f"no checkpoint of step {step}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run directory of two steps in two processes of four devices."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(run_dir, start(run_dir, [4, 4]))
    return run_dir


@pytest.mark.parametrize("devices", [8, 1])
def test_two_processes_do_what_one_does(start, whole, tmp_path, devices):
    """Tokens and rewards to the bit, numbers of the update to rounding, in every step."""
    run_dir = tmp_path / "run"
    finish(run_dir, start(run_dir, [devices]))
    ours, theirs = (read_jsonl(folder / "samples.jsonl") for folder in (whole, run_dir))
    assert len(ours) == len(theirs) == 2 * 16
    for name in ("completion", "reward", "tokens", "split"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert len({row["completion"] for row in ours}) > 16 and len({row["reward"] for row in ours}) > 2
    for step in (1, 2):
        mine, other = (np.load(folder / "tokens" / f"step_{step:06d}.npz") for folder in (whole, run_dir))
        np.testing.assert_array_equal(mine["tokens"], other["tokens"])
        np.testing.assert_array_equal(mine["lengths"], other["lengths"])
        np.testing.assert_allclose(mine["logprobs"], other["logprobs"], atol=1e-4)
    for ours, theirs in zip(
        *(read_jsonl(folder / "metrics.jsonl") for folder in (whole, run_dir)), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    first, second = (restore(folder, 2) for folder in (whole, run_dir))
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), restore(whole, 1), first)
    assert max(jax.tree.leaves(changed)) > 1e-4
    # A hundredth of a step of 0.001; but where a gradient is no more than rounding, Adam makes a step of it.
    apart = jax.tree.map(lambda a, b: np.abs(a - b) - 1e-3 * np.abs(b), first, second)
    apart = np.concatenate([each.ravel() for each in jax.tree.leaves(apart)])
    assert np.mean(apart > 1e-5) < 1e-5 and apart.max() < 1e-4


def restore(run_dir: Path, step: int):
    """The arrays of a checkpoint, whole."""
    with ocp.PyTreeCheckpointer() as reader:
        path = run_dir / "checkpoints" / str(step) / "state"
        shapes = reader.metadata(path).item_metadata.tree
        like = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return reader.restore(path, restore_args=like)


# Each process a slice: the weights are whole, as nothing then waits for loopback at every token.
PAIR = (
    "mesh.slice=2",
    "mesh.fsdp=1",
    "steps=6",
    f"data.eval={ROOT / 'srrl_jax/tinyworld/hard.jsonl'}",
    "eval.rows=4",
    "eval.every=3",
    "checkpoint.preemption_seconds=100",
)


def test_killed_and_preempted_processes_end_together_and_go_on(start, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    finish(straight, start(straight, [1, 1], *PAIR))

    pair = start(cut, [1, 1], *PAIR)
    wait_for_step(1, cut, pair)
    pair[1].send_signal(signal.SIGKILL)
    assert pair[0].wait(timeout=HEARTBEAT_SECONDS + 90) in (1, -signal.SIGABRT)
    told = output(cut, 0)
    assert "another process was lost first" in told or "distributed service detected fatal errors" in told

    pair = start(cut, [1, 1], *PAIR)
    wait_for_step(3, cut, pair)
    pair[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=130) for process in pair] == [75, 75]
    kinds = [row["event"] for row in read_jsonl(cut / "events.jsonl")]
    assert kinds == ["start", "resume", "preempted"]  # written once

    finish(cut, start(cut, [1, 1], *PAIR))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes()
    assert [row["step"] for row in read_jsonl(cut / "metrics.jsonl")] == list(range(7))


def test_an_error_of_one_process_ends_both(start, tmp_path):
    """The main process alone writes logs, and cannot."""
    run_dir = tmp_path / "run"
    (run_dir / "samples.jsonl").mkdir(parents=True)
    pair = start(run_dir, [1, 1], *PAIR)
    assert pair[0].wait(timeout=900) == 2
    assert "process 0 of 2" in output(run_dir, 0) and "cannot write the logs" in output(run_dir, 0)
    assert pair[1].wait(timeout=HEARTBEAT_SECONDS + 90) != 0


def test_processes_with_different_recipes_are_refused(start, tmp_path):
    run_dir = tmp_path / "run"
    pair = start(run_dir, [1, 1], *PAIR, each=(["seed=1"], ["seed=2"]))
    codes = [process.wait(timeout=900) for process in pair]
    told = output(run_dir, 0) + output(run_dir, 1)
    assert 2 in codes and 0 not in codes
    assert "process 1 has another recipe than process 0" in told
    assert not (run_dir / "metrics.jsonl").exists()
