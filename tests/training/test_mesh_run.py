"""A whole run on several devices; in a process of its own, since their number is fixed when JAX starts."""

import json
import os
import subprocess
import sys

import pytest
import yaml

pytestmark = pytest.mark.slow

CHILD = """
import json, sys, tempfile
import jax
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import TrainConfig, train
jax.config.update("jax_disable_most_optimizations", True)
assert len(jax.devices()) == 4
seen = []
for overrides in json.loads(sys.argv[2]):
    run_dir = tempfile.mkdtemp(dir=sys.argv[3])
    try:
        train(TrainConfig.load(sys.argv[1], [*overrides, f"run_dir={run_dir}"]))
        seen.append([read_jsonl(f"{run_dir}/metrics.jsonl"), read_jsonl(f"{run_dir}/samples.jsonl")])
    except InputError as error:
        seen.append(str(error))
print("RESULT" + json.dumps(seen))
"""


def on_four_devices(config, runs: list[list[str]], folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), json.dumps(runs), str(folder)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("RESULT")[2])


def test_every_mesh_gives_the_same_first_step(recipe, tmp_path):
    config = recipe(
        tmp_path, "steps=1", "prompts_per_step=4", "optimizer.microbatch=4", "optimizer.warmup_steps=0"
    )
    meshes = [(4, 1, 1), (1, 4, 1), (2, 1, 2)]
    runs = [[f"mesh.data={d}", f"mesh.fsdp={f}", f"mesh.tensor={t}"] for d, f, t in meshes]
    *results, refused = on_four_devices(config, [*runs, [*runs[0], "optimizer.microbatch=2"]], tmp_path)
    assert "optimizer.microbatch must be a multiple of mesh data x fsdp x expert = 4" in refused
    (first,), samples = results[0]
    assert first["grad_norm"] > 0
    for (metrics,), other_samples in results[1:]:
        assert [s["completion"] for s in other_samples] == [s["completion"] for s in samples]
        assert [s["reward"] for s in other_samples] == [s["reward"] for s in samples]
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert metrics[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5)
        assert metrics["logprob_diff/max"] < 1e-4
