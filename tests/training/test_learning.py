"""Does it learn? The demo's recipe, shortened, over a fixed seed; minutes long."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from srrl_jax.rubrics import Criterion, score_response
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import oracle
from srrl_jax.training import TrainConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    """`srrl train` in a process of its own."""
    config = TrainConfig.load(
        ROOT / "configs/demo.yaml",
        [
            f"run_dir={run_dir}", f"steps={STEPS}", "checkpoint.every=5", "eval.every=10",
            *(f"{key}={ROOT / 'srrl_jax/tinyworld' / name}" for key, name in {
                "model": "checkpoint", "data.train": "easy.jsonl", "data.eval": "hard.jsonl",
                "grading.template": "grader.txt"}.items()),
            *overrides,
        ],
    )  # fmt: skip
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", "from srrl_jax.cli import main; main()", "train", str(path)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def oracle_scores(run_dir: Path) -> dict[int, float]:
    """Mean true score of the held-out completions, by step."""
    scores: dict[int, list[float]] = {}
    for row in read_jsonl(run_dir / "samples.jsonl"):
        if row["split"] == "eval":
            criteria = [Criterion(c["criterion"], c["points"]) for c in row["criteria"]]
            truth = [oracle(row["response"], criterion.criterion) for criterion in criteria]
            scores.setdefault(row["step"], []).append(score_response(criteria, truth))
    return {step: float(np.mean(values)) for step, values in scores.items()}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Path:
    """A run that was killed once on the way."""
    run_dir = tmp_path_factory.mktemp("learning") / "run"
    process = start(run_dir)
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.exists() and len(read_jsonl(metrics)) > STEPS // 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(run_dir).wait(900) == 0
    return run_dir


def test_the_oracle_score_rises_over_a_kill(learnt):
    steps = [row["step"] for row in read_jsonl(learnt / "metrics.jsonl")]
    assert steps == list(range(STEPS + 1))
    assert "resume" in [line["event"] for line in read_jsonl(learnt / "events.jsonl")]
    scores = oracle_scores(learnt)
    assert sorted(scores) == [0, 10, 20, 30]
    assert scores[30] > scores[0] + 0.15, scores


def test_the_policy_that_samples_is_the_one_that_learns(learnt):
    gaps = [row["logprob_diff/max"] for row in read_jsonl(learnt / "metrics.jsonl") if row["step"] > 0]
    assert max(gaps) < 1e-4


def test_a_larger_coefficient_holds_the_policy_closer_to_its_start(learnt, tmp_path):
    held = tmp_path / "held"
    assert start(held, "kl_coef=1.0", "data.eval=null").wait(900) == 0

    def kl(run_dir):
        return np.mean(
            [row["kl"] for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"] > STEPS // 2]
        )

    assert kl(held) < 0.5 * kl(learnt)
