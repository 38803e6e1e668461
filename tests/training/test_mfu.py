"""FLOPs that an update asks for, and their share of the peak."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.models import counts
from srrl_jax.models.counts import Tree
from srrl_jax.models.presets import PRESETS
from srrl_jax.run.session import each_compilation
from srrl_jax.sampling import Completion
from srrl_jax.training.mfu import model_flops, update_mfu

MODEL = PRESETS["qwen3-8b"]


def test_a_full_batch_is_what_the_plan_counts_without_what_is_computed_again():
    """The plan's update computes the head's logits a second time."""
    tree = Tree(n=3, p=64, b=4, l=32)
    plan = counts.update(MODEL, tree, 2, causal=True, remat="none").flops
    again = counts.head(MODEL, 3 * 4 * 32, 2).flops
    assert model_flops(MODEL, [64] * 3, [[32] * 4] * 3, adapters=False) == pytest.approx(plan - again)


def test_every_token_once_and_every_pair_that_the_mask_leaves():
    prompts, completions = [100, 7], [[200, 50], [1, 3]]
    tokens = 100 + 250 + 7 + 4
    pairs = 100**2 / 2 + 100 * 250 + (200**2 + 50**2) / 2 + 7**2 / 2 + 7 * 4 + (1 + 9) / 2
    attention = 4 * 36 * 32 * 128 * pairs
    head = 2 * 151936 * 4096 * (250 + 4)
    once = 2 * counts.layer_weights(MODEL) * tokens + attention + head
    assert model_flops(MODEL, prompts, completions, adapters=False) == pytest.approx(3 * once)
    assert model_flops(MODEL, prompts, completions, adapters=True) == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_the_share_of_all_devices_peak(monkeypatch, kind, peak):
    device = SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    none = np.zeros(8, np.float32)
    tasks, groups = [SimpleNamespace(prompt=[0] * 16)], [[Completion(none, none, False)] * 2]
    flops = model_flops(MODEL, [16], [[8, 8]], adapters=False)
    found = update_mfu(MODEL, tasks, groups, seconds=0.5, adapters=False)
    assert found == {"perf/mfu": pytest.approx(flops / (0.5 * 4 * peak))}


def test_a_cpu_has_no_published_peak():
    assert update_mfu(MODEL, [], [], seconds=1.0, adapters=False) == {}


def test_each_compilation_is_told_once():
    seconds, names = [], []
    double = jax.jit(lambda x: 2 * x + 17.25)
    x = jnp.arange(3.0)
    with each_compilation(names.append, lambda name, took: seconds.append(took)):
        double(x)
        assert len(seconds) == 1 and seconds[0] > 0
        double(x)
    double(jnp.arange(4.0))
    assert len(seconds) == 1
    assert names == ["jit(<lambda>)", ""]  # when it begins and when it ends
