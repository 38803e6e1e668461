"""Meshes and placement, on this process's devices and on eight virtual ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.parallel import MeshConfig, constrain, make_mesh, shardings

TINY = Qwen3Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1, 0)])
def test_bad_config(sizes):
    with pytest.raises(InputError, match=r"^mesh: sizes must be positive, at most one of them -1, not \("):
        MeshConfig(*sizes)


class Device:
    """Stands for one of many devices; make_mesh only arranges them."""


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1, 1)),
        ((2, 2, 2), (2, 2, 2, 1)),
        ((-1, 2, 4), (1, 2, 4, 1)),
        ((2, 1, -1), (2, 1, 4, 1)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
    ],
)
def test_mesh_shape(sizes, shape):
    devices = np.array([Device() for _ in range(8)])
    mesh = make_mesh(MeshConfig(*sizes), devices)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "expert") and mesh.devices.shape == shape
    assert list(mesh.devices.flat) == list(devices)


@pytest.mark.parametrize("sizes", [(2, 2, 1), (3, -1, 1), (4, 4, 1), (16, -1, 1)])
def test_mesh_of_other_devices(sizes):
    with pytest.raises(InputError, match=r"^mesh: .* there are 8; set one axis to -1"):
        make_mesh(MeshConfig(*sizes), [Device() for _ in range(8)])


def test_default_mesh_takes_every_device():
    assert make_mesh().devices.shape == (1, jax.device_count(), 1, 1)


def test_shardings_follow_the_table():
    state = nnx.state(nnx.eval_shape(lambda: Qwen3(TINY, rngs=nnx.Rngs(0))))
    mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    specs = {".".join(path): s.spec for path, s in nnx.to_flat_state(shardings(state, mesh))}
    assert specs["embed_tokens.weight"] == specs["lm_head.weight"] == P("tensor", "fsdp")
    assert specs["layers.self_attn.q_proj.weight"] == P(None, "tensor", "fsdp")
    assert specs["layers.self_attn.k_proj.weight"] == P(None, "tensor", "fsdp")
    assert specs["layers.self_attn.o_proj.weight"] == P(None, "fsdp", "tensor")
    assert specs["layers.self_attn.q_norm.weight"] == P(None, None)
    assert specs["layers.mlp.down_proj.weight"] == P(None, "fsdp", "tensor")
    assert specs["layers.input_layernorm.weight"] == P(None, "fsdp")
    assert specs["norm.weight"] == P("fsdp")


def test_what_does_not_divide_stays_whole():
    state = nnx.state(nnx.eval_shape(lambda: Qwen3(TINY, rngs=nnx.Rngs(0))))
    mesh = AbstractMesh((1, 3, 16), ("data", "fsdp", "tensor"))
    specs = {".".join(path): s.spec for path, s in nnx.to_flat_state(shardings(state, mesh))}
    assert specs["embed_tokens.weight"] == P("tensor", None)  # 32 by 16, 16 not by 3
    assert specs["layers.self_attn.k_proj.weight"] == P(None, None, None)  # 8 not by 16
    assert specs["layers.self_attn.q_proj.weight"] == P(None, "tensor", None)


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch", None) is x


@pytest.fixture(scope="module")
def eight(shared_data):
    """Numbers of eight_devices.py."""
    script = Path(__file__).with_name("eight_devices.py")
    flags = "--xla_force_host_platform_device_count=8"
    # Compiles sooner.
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += " --xla_cpu_use_fusion_emitters=false"
    result = subprocess.run(
        [sys.executable, script, shared_data / "tiny-qwen3-tied"],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["devices"] == 8
    return report


def test_weights_are_cut(eight):
    shapes = eight["shapes"]
    assert shapes["embed_tokens.weight"] == [[512, 64], [256, 32]]
    assert shapes["layers.self_attn.q_proj.weight"] == [[2, 128, 64], [2, 64, 32]]
    assert shapes["layers.self_attn.k_proj.weight"] == [[2, 64, 64], [2, 32, 32]]
    assert shapes["layers.self_attn.o_proj.weight"] == [[2, 64, 128], [2, 32, 64]]
    assert shapes["layers.self_attn.k_norm.weight"] == [[2, 32], [2, 32]]
    assert shapes["layers.mlp.up_proj.weight"] == [[2, 160, 64], [2, 80, 32]]
    assert shapes["layers.mlp.down_proj.weight"] == [[2, 64, 160], [2, 32, 80]]
    assert shapes["norm.weight"] == [[64], [32]]


def test_samples_equal_one_device(eight):
    (tokens, logprobs), (expected_tokens, expected_logprobs) = eight["mesh"], eight["one"]
    assert tokens == expected_tokens and len(tokens) == 10
    assert min(map(len, tokens)) < max(map(len, tokens)) == 8  # some stopped
    np.testing.assert_allclose(sum(logprobs, []), sum(expected_logprobs, []), rtol=0, atol=1e-5)


def test_gradients_equal_one_device(eight):
    assert len(eight["gradient_errors"]) == len(eight["shapes"]) == 13
    assert max(eight["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize(("sizes", "shard"), [((1, 1, 2, 4), [1, 1, 4, 16]), ((1, 2, 2, 2), [1, 2, 4, 8])])
def test_experts_on_a_mesh_equal_one_device(eight, sizes, shard):
    report = eight["experts"][str(sizes)]
    assert report["shard"] == shard
    assert "moe_layers.mlp.gate.weight" in report["gradient_errors"]
    assert max(report["gradient_errors"].values()) < 1e-5


def test_experts_must_divide(eight):
    assert eight["experts_error"] == (
        "mesh.expert (8) must divide the 4 experts of moe_layers.mlp.experts.down_proj.weight (1, 4, 16, 8); "
        "use one of 1, 2, 4"
    )


def test_rows_must_divide(eight):
    assert eight["rows_error"] == "buckets.rows: (4, 6) must be multiples of mesh data x fsdp x expert = 4"
