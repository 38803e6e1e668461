"""Recipes and devices of the tests of planning."""

import importlib.util
import os
from pathlib import Path

import pytest

from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import model_config
from srrl_jax.planning.programs import Setup
from srrl_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "srrl_jax" / "tinyworld"


@pytest.fixture(scope="session")
def planned():
    """Makes the demo's recipe smaller: (*overrides)."""
    small = [
        f"model={WORLD / 'checkpoint'}",
        f"grading.template={WORLD / 'grader.txt'}",
        "prompts_per_step=8",
        "group_size=4",
        "optimizer.microbatch=4",
        "rollout.rows=[8]",
        "grading.rows=[8]",
        "mesh.fsdp=2",
        "mesh.tensor=2",
    ]

    def make(*overrides: str) -> TrainConfig:
        return TrainConfig.load(ROOT / "configs/demo.yaml", [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def v6e() -> Topology:
    """Four TPU v6e chips to compile for: the extra `aot` (libtpu). CI must have it."""
    if os.environ.get("CI") != "true" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the extra `aot` (libtpu)")
    return Topology.parse("v6e:2x2")


@pytest.fixture(scope="session")
def h100() -> Topology:
    """Two nodes of two GPUs to compile for: JAX's CUDA plugin."""
    topology = Topology.parse("h100:2x2")
    if not topology.compiles:
        pytest.skip("needs JAX's CUDA plugin (the extra `plan-gpu`)")
    return topology


@pytest.fixture(scope="session")
def setup(planned, v6e) -> Setup:
    """Of the small recipe on four chips, fsdp 2 x tensor 2."""
    config = planned("rollout.prompt_buckets=[80]")
    return Setup.of(config, model_config(config.model), v6e.devices())
