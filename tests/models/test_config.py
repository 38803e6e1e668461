"""Reading and writing config.json."""

import json

import pytest

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3Config

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def test_reads_dict_file_and_directory_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = Qwen3Config.from_hf(QWEN3)
    assert config == Qwen3Config.from_hf(tmp_path) == Qwen3Config.from_hf(tmp_path / "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (2, 32, 1e6)
    assert config.qk_norm and not config.qkv_bias and not config.o_bias


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5}])
def test_round_trip(model_type, fields):
    config = Qwen3Config.from_hf({**QWEN3, **fields, "model_type": model_type})
    assert Qwen3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "model_type, qk_norm, qkv_bias", [("qwen3", True, False), ("qwen2", False, True), ("llama", False, False)]
)
def test_family_switches(model_type, qk_norm, qkv_bias):
    config = Qwen3Config.from_hf({**QWEN3, "model_type": model_type})
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (qk_norm, qkv_bias, False)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_silent_fields_are_what_transformers_takes(model_type):
    from transformers import AutoConfig

    fields = {**QWEN3, "model_type": model_type}
    for name in ("head_dim", "rope_theta", "tie_word_embeddings"):
        del fields[name]
    theirs = AutoConfig.for_model(**fields)
    ours = Qwen3Config.from_hf(fields)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_nested_rope_of_transformers_5():
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}
    flat = {key: value for key, value in QWEN3.items() if key != "rope_theta"}
    assert Qwen3Config.from_hf({**flat, **nested}) == Qwen3Config.from_hf(QWEN3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"model_type": None}, "model_type"),
        ({"num_experts": 8}, "num_experts"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_mrope": True}, "use_mrope"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 31}, "head_dim"),
    ],
)
def test_refuses_what_it_does_not_compute(fields, message):
    with pytest.raises(InputError, match=message):
        Qwen3Config.from_hf({**QWEN3, **fields})


def test_missing_field_and_broken_file_are_named(tmp_path):
    with pytest.raises(InputError, match="hidden_size"):
        Qwen3Config.from_hf({k: v for k, v in QWEN3.items() if k != "hidden_size"})
    with pytest.raises(InputError, match="config.json"):
        Qwen3Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3",\n oops')
    with pytest.raises(InputError, match=r"config.json:2"):
        Qwen3Config.from_hf(tmp_path)
