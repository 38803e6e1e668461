"""Llama 3's rope type beside transformers' own."""

import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3Config
from srrl_jax.models.rope import frequencies

SIZES = dict(
    model_type="llama", vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=64, max_position_embeddings=131072,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"low_freq_factor": 2.5},
        {"high_freq_factor": 7.0},
        {"original_max_position_embeddings": 512},
        {"rope_theta": 1e4},
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama3_frequencies_are_those_of_transformers(changes, key):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA3 | changes
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SIZES, rope_parameters=rope), "cpu")
    flat = {"rope_theta": rope["rope_theta"]} if key == "rope_scaling" else {}
    config = Qwen3Config.from_hf(SIZES | {key: {k: v for k, v in rope.items() if k not in flat}} | flat)
    ours = frequencies(64, config.rope_theta, config.rope_scaling)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert factor == config.rope_scaling.attention_factor
    assert Qwen3Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": 4.0}, "low_freq_factor of the rope parameters must be below"),
        ({"factor": None}, "factor of the rope parameters must be a number"),
        ({"beta_fast": 3}, "rope type 'llama3' with field.*beta_fast"),
    ],
)
def test_llama3_parameters_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Qwen3Config.from_hf(SIZES | {"rope_parameters": LLAMA3 | changes})
