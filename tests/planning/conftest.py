"""Recipes and devices of the tests of planning."""

import importlib.util
import os
from pathlib import Path

import pytest

from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import model_config
from srrl_jax.planning.programs import Setup
from srrl_jax.sampling import RowLengths
from srrl_jax.training import TrainConfig
from srrl_jax.training.shapes import RunLengths

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
def setup(planned, v6e, make_setup) -> Setup:
    """Of the small recipe on four chips, fsdp 2 x tensor 2."""
    return make_setup(planned(), v6e.devices(), prompt=256)


@pytest.fixture(scope="session")
def make_setup():
    """Of a recipe whose rows have prompts of so many tokens, and eight criteria."""

    def make(config: TrainConfig, devices: list, sizes=None, prompt: int = 32) -> Setup:
        asked = RowLengths(prompt + 40, [16] * 8)
        lengths = RunLengths([RowLengths(prompt, [0] * config.group_size)] * 8, [asked])
        return Setup.of(config, sizes or model_config(config.model), devices, lengths)

    return make
