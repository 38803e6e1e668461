"""A whole run on several devices; in a process of its own, since their number is fixed when JAX starts."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from srrl_jax.telemetry import read_jsonl

pytestmark = pytest.mark.slow

CHILD = """
import json, sys, tempfile
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl
from srrl_jax.run import train
from srrl_jax.training import TrainConfig
seen = []
for overrides in json.loads(sys.argv[2]):
    run_dir = sys.argv[3] if sys.argv[4] == "resume" else tempfile.mkdtemp(dir=sys.argv[3])
    try:
        train(TrainConfig.load(sys.argv[1], [*overrides, f"run_dir={run_dir}"]))
        seen.append([read_jsonl(f"{run_dir}/metrics.jsonl"), read_jsonl(f"{run_dir}/samples.jsonl")])
    except InputError as error:
        seen.append(str(error))
print("RESULT" + json.dumps(seen))
"""


@pytest.fixture
def on_devices():
    """Runs on so many devices: what each logs, or why it was refused.

    In a directory of its own, or (`where` is "resume") in `folder` itself.
    """

    def run(count: int, config, runs: list[list[str]], folder, where: str = "anew"):
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        result = subprocess.run(
            [sys.executable, "-c" + CHILD, str(path), json.dumps(runs), str(folder), where],
            env=os.environ
            | {
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.rpartition("RESULT")[2])

    return run


def test_every_mesh_gives_the_same_first_step(recipe, on_devices, tmp_path):
    config = recipe(
        tmp_path,
        "steps=1",
        "prompts_per_step=4",
        "optimizer.minibatches=1",
        "optimizer.microbatch=4",
        "optimizer.warmup_steps=0",
    )
    meshes = [(1, 4, 1, 1), (1, 1, 4, 1), (1, 2, 1, 2), (2, 1, 2, 1)]
    axes = ("slice", "data", "fsdp", "tensor")
    runs = [[f"mesh.{axis}={size}" for axis, size in zip(axes, mesh, strict=True)] for mesh in meshes]
    runs[2] += ["reference=host"]  # cut as the policy is, in memory of the host
    *results, refused = on_devices(4, config, [*runs, [*runs[0], "optimizer.microbatch=2"]], tmp_path)
    assert (
        "optimizer.microbatch must be a multiple of mesh slice x data x fsdp x expert = 4, not 2" in refused
    )
    (first,), samples = results[0]
    assert first["grad_norm"] > 0
    for (metrics,), other_samples in results[1:]:
        assert [s["completion"] for s in other_samples] == [s["completion"] for s in samples]
        assert [s["reward"] for s in other_samples] == [s["reward"] for s in samples]
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert metrics[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5)
        assert metrics["logprob_diff/max"] < 1e-4


def test_a_run_of_eight_devices_goes_on_with_four(recipe, on_devices, tmp_path):
    config = recipe(
        tmp_path,
        "prompts_per_step=8",
        "optimizer.minibatches=1",
        "optimizer.microbatch=8",
        "optimizer.warmup_steps=0",
        "checkpoint.every=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    ((metrics, samples),) = on_devices(8, config, [["steps=2"]], whole, "resume")
    on_devices(8, config, [["steps=1"]], cut, "resume")
    ((resumed, resumed_samples),) = on_devices(
        4, config, [["steps=2", "mesh.fsdp=2", "mesh.data=2"]], cut, "resume"
    )
    assert [row["step"] for row in resumed] == [1, 2] and resumed[0] == metrics[0]
    assert [s["completion"] for s in resumed_samples] == [s["completion"] for s in samples]
    assert [s["reward"] for s in resumed_samples] == [s["reward"] for s in samples]
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert resumed[1][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-5)
    (event,) = [row for row in read_jsonl(cut / "events.jsonl") if row["event"] == "resume"]
    assert "mesh.fsdp was -1, now 2" in event["message"]
