"""Meshes and placement, on this process's devices and on eight virtual ones."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
from srrl_jax.parallel import MeshConfig, computing, constrain, make_mesh, shardings
from srrl_jax.parallel.mesh import look_for_gpu

TINY = Qwen3Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1, 1, 0)])
def test_bad_config(sizes):
    with pytest.raises(InputError, match=r"^mesh: sizes must be positive, at most one of them -1, not \("):
        MeshConfig(*sizes)


def test_a_mesh_on_the_command_line_is_read_as_in_a_recipe():
    assert MeshConfig.parse("") == MeshConfig()
    assert MeshConfig.parse("data=2, tensor=4") == MeshConfig(data=2, tensor=4)
    assert MeshConfig.parse("data=-1,fsdp=1") == MeshConfig(data=-1, fsdp=1)
    for text in ("tensors=2", "tensor", "tensor=two"):
        with pytest.raises(InputError, match="where AXIS is slice, data, fsdp, tensor or expert"):
            MeshConfig.parse(text)


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for one of many devices; make_mesh only arranges them."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = ""


EIGHT = [Device(i) for i in range(8)]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, 1, -1, 1), (1, 1, 8, 1, 1)),
        ((1, 2, 2, 2), (1, 2, 2, 2, 1)),
        ((1, -1, 2, 4), (1, 1, 2, 4, 1)),
        ((1, 2, 1, -1), (1, 2, 1, 4, 1)),
        ((1, 1, 2, 1, -1), (1, 1, 2, 1, 4)),
        ((2, 1, -1), (2, 1, 4, 1, 1)),
        ((-1, 1, 2), (4, 1, 2, 1, 1)),
    ],
)
def test_mesh_shape(sizes, shape):
    mesh = make_mesh(MeshConfig(*sizes), EIGHT)
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor", "expert") and mesh.devices.shape == shape
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize("sizes", [(1, 2, 2, 1), (1, 3, -1, 1), (1, 4, 4, 1), (16, 1, -1)])
def test_mesh_of_other_devices(sizes):
    with pytest.raises(InputError, match=r"^mesh: .* there are 8; set one axis to -1 .* of 1, 2, 4 or 8$"):
        make_mesh(MeshConfig(*sizes), EIGHT)


def tpu(slices: int) -> list[Device]:
    """Slices of 2 x 2 chips, whose devices are not listed by slice."""
    return [
        Device(i, 0, "tpu", i % slices, (i // slices % 2, i // slices // 2, 0)) for i in range(4 * slices)
    ]


@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (2, 1, -1), (-1, 1, 1, 4)])
def test_slices_of_a_tpu_lie_along_the_first_axis(sizes):
    mesh = make_mesh(MeshConfig(*sizes), tpu(2))
    assert mesh.shape["slice"] == 2 and set(mesh.devices.flat) == set(tpu(2))
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(("sizes", "slices"), [((1, 2, -1), 2), ((2, 1, -1), 1), ((4, 1, -1), 2)])
def test_another_number_of_slices_than_the_tpu_has_is_refused(sizes, slices):
    message = rf"mesh\.slice \({sizes[0]}\) must be the number of the TPU's slices, which is {slices}$"
    with pytest.raises(InputError, match=message):
        make_mesh(MeshConfig(*sizes), tpu(slices))


def test_a_slice_of_processes_is_whole_ones_or_a_part_of_one():
    """As nodes with GPUs: three of four devices."""
    devices = [Device(i, process_index=i // 4) for i in range(12)]
    for count in (1, 3, 6, 12):
        mesh = make_mesh(MeshConfig(slice=count), devices)
        assert mesh.devices.shape == (count, 1, 12 // count, 1, 1)
    with pytest.raises(
        InputError, match=r"^mesh\.slice \(2\) would cut .* 3 processes apart; use 1 or 3, or"
    ):
        make_mesh(MeshConfig(slice=2), devices)


def test_default_mesh_takes_every_device():
    assert make_mesh().devices.shape == (1, 1, jax.device_count(), 1, 1)


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


@pytest.mark.parametrize(
    ("dtype", "precision", "highest"),
    [("float32", "highest", True), ("float32", "default", False), ("bfloat16", "highest", False)],
)
def test_products_of_float32_are_lowered_as_such(dtype, precision, highest):
    def lowered() -> str:
        return jax.jit(lambda x: x @ x).lower(np.ones((2, 2), dtype)).as_text()

    with computing(make_mesh(), dtype, precision):
        with ThreadPoolExecutor(1) as pool:  # programs are also compiled in other threads
            texts = [lowered(), pool.submit(lowered).result()]
    assert ["precision = [HIGHEST, HIGHEST]" in text for text in texts] == [highest] * 2
    assert "HIGHEST" not in lowered()


def test_a_gpu_that_jax_does_not_use_is_told_once(monkeypatch, caplog):
    look_for_gpu.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    make_mesh()
    assert not caplog.messages  # as was asked for
    monkeypatch.delenv("JAX_PLATFORMS")
    for _ in range(2):
        make_mesh()
    (message,) = caplog.messages
    assert "pip install 'srrl-jax[cuda13]'" in message


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


def test_little_travels_between_slices(eight):
    """While sampling what the host is told, of 8 slots with 8 tokens each; in an update gradients."""
    between, within = eight["between_slices"], eight["within_slices"]
    assert all(within[name] for name in ("relayout", "prefill", "decode", "gradient"))
    shapes = {
        name: [
            re.findall(r"\d+", shape) for line in lines for shape in re.findall(r"\w\d*\[([\d,]*)\]", line)
        ]
        for name, lines in between.items()
    }
    assert between["relayout"] == between["prefill"] == between["empty caches"] == []
    assert max(math.prod(map(int, shape)) for shape in shapes["decode"]) == 8 * 8
    assert all(line.startswith("all-reduce ") for line in between["gradient"])
    assert {("64", "80"), ("256", "32")} < set(map(tuple, shapes["gradient"]))  # of an MLP and of the head
    assert max(map(len, shapes["gradient"])) == 2  # what is of tokens has more axes


def test_gradients_equal_one_device(eight):
    assert len(eight["gradient_errors"]) == len(eight["shapes"]) == 13
    assert max(eight["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        ((1, 1, 1, 2, 4), [1, 1, 3, 16]),
        ((2, 1, 2, 1, 2), [1, 2, 6, 8]),
        ((1, 1, 1, 4, 2), [1, 2, 6, 16]),
        ((1, 1, 2, 1, 4), [1, 1, 6, 8]),
    ],
)
def test_experts_on_a_mesh_equal_one_device(eight, sizes, shard):
    report = eight["experts"][str(sizes)]
    assert report["shard"] == shard
    assert "moe_layers.mlp.gate.weight" in report["gradient_errors"]
    assert max(report["gradient_errors"].values()) < 1e-5


def test_experts_must_divide(eight):
    assert eight["experts_error"] == (
        "mesh.expert (8) must divide the 4 experts of moe_layers.mlp.experts.down_proj.weight (1, 4, 16, 6); "
        "use 1, 2 or 4"
    )
