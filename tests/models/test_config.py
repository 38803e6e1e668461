"""Reading and writing config.json."""

import json

import pytest

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3Config
from srrl_jax.models.config import MoEConfig

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
MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_reads_dict_file_and_directory_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = Qwen3Config.from_hf(QWEN3)
    assert config == Qwen3Config.from_hf(tmp_path) == Qwen3Config.from_hf(tmp_path / "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (2, 32, 1e6)
    assert config.qk_norm and not config.qkv_bias and not config.o_bias


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 77},
        {"rope_scaling": {"type": "linear", "factor": 3}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False,
                          "beta_fast": 20, "beta_slow": 2, "original_max_position_embeddings": 99}},
    ],
)  # fmt: skip
def test_round_trip(model_type, fields):
    config = Qwen3Config.from_hf({**QWEN3, **fields, "model_type": model_type})
    assert Qwen3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2"])
@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, [None, 5]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096, 4096]),
        (
            {"use_sliding_window": True, "sliding_window": 5,
             "layer_types": ["sliding_attention", "full_attention"]},
            [5, None],
        ),
        ({"use_sliding_window": True, "sliding_window": 5}, None),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 2}, None),
    ],
)  # fmt: skip
def test_sliding_layers_are_those_of_transformers(model_type, fields, expected):
    from transformers import AutoConfig

    fields = {**QWEN3, **fields, "model_type": model_type}
    ours = Qwen3Config.from_hf(fields)
    for source in (fields, ours.to_hf()):
        theirs = AutoConfig.for_model(**source)
        sizes = [theirs.sliding_window if "sliding" in kind else None for kind in theirs.layer_types]
        assert sizes == (expected or [None, None])
    if expected is None:
        assert ours.windows is None
    else:
        assert [None if size > 10**6 else size for size in ours.windows.tolist()] == expected
    assert Qwen3Config.from_hf(json.loads(json.dumps(ours.to_hf()))) == ours


@pytest.mark.parametrize(
    "model_type, qk_norm, qkv_bias", [("qwen3", True, False), ("qwen2", False, True), ("llama", False, False)]
)
def test_family_switches(model_type, qk_norm, qkv_bias):
    config = Qwen3Config.from_hf({**QWEN3, "model_type": model_type})
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (qk_norm, qkv_bias, False)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_silent_fields_are_what_transformers_takes(model_type):
    from transformers import AutoConfig

    fields = {**QWEN3, "model_type": model_type}
    for name in ("head_dim", "rope_theta", "tie_word_embeddings", "num_key_value_heads"):
        del fields[name]
    fields["num_attention_heads"], fields["hidden_size"] = 32, 256
    theirs = AutoConfig.for_model(**fields)
    ours = Qwen3Config.from_hf(fields)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    if model_type == "qwen3_moe":
        assert ours.moe == MoEConfig(
            theirs.num_experts,
            theirs.num_experts_per_tok,
            theirs.moe_intermediate_size,
            theirs.norm_topk_prob,
            tuple(theirs.mlp_only_layers),
            theirs.router_aux_loss_coef,
        )


@pytest.mark.parametrize(
    "fields, has_experts",
    [
        ({}, (True,) * 5),
        ({"decoder_sparse_step": 2}, (False, True, False, True, False)),
        ({"mlp_only_layers": [0, 3, 9]}, (False, True, True, False, True)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False, True, False)),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, (False,) * 5),
    ],
)
def test_layers_of_experts_are_those_of_transformers(fields, has_experts):
    fields = {**QWEN3, **MOE, **fields, "num_hidden_layers": 5}
    config = Qwen3Config.from_hf(fields)
    assert config.has_experts == has_experts
    assert Qwen3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    named = {("num_local_experts" if k == "num_experts" else k): v for k, v in fields.items()}
    assert Qwen3Config.from_hf(named) == config


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, [5, 5]),
        ({"use_sliding_window": False, "sliding_window": 5}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
    ],
)
def test_all_layers_of_qwen3_moe_slide_or_none(fields, windows):
    config = Qwen3Config.from_hf({**QWEN3, **MOE, **fields})
    assert (config.windows if windows is None else config.windows.tolist()) == windows
    assert Qwen3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


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
        ({**MOE, "num_experts": 0}, "num_experts"),
        ({**MOE, "num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must not be over num_experts \(8\)"),
        ({**MOE, "num_local_experts": 9}, "num_experts and num_local_experts differ"),
        ({**MOE, "decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({**MOE, "moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({**MOE, "shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ({**MOE, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized safetensors are not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 16}}, "'linear'.*beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"factor": 2.0}}, "'default'.*factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": [1]}, "rope_parameters must be objects"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types.*use_sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "sliding_window"),
        (
            {"model_type": "llama", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "llama",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_mrope": True}, "use_mrope"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 31}, "head_dim"),
    ],
)
def test_refuses_what_it_does_not_compute(fields, message):
    with pytest.raises(InputError, match=message):
        Qwen3Config.from_hf({**QWEN3, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "abc"),
        ("hidden_size", None),
        ("vocab_size", -1),
        ("num_hidden_layers", 1.5),
        ("intermediate_size", 2**40),
        ("head_dim", [64]),
        ("max_position_embeddings", True),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", "1e6"),
        ("tie_word_embeddings", "false"),
        ("sliding_window", {}),
        ("layer_types", 3),
        ("model_type", ["qwen3"]),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, field: value}))
    with pytest.raises(InputError, match=rf"config\.json: .*{field}"):
        Qwen3Config.from_hf(tmp_path)


@pytest.mark.parametrize("field", ["num_experts", "moe_intermediate_size", "mlp_only_layers"])
def test_a_field_of_experts_of_another_type_is_named(field):
    with pytest.raises(InputError, match=field):
        Qwen3Config.from_hf({**QWEN3, "model_type": "qwen3_moe", field: "many"})


def test_missing_field_and_broken_file_are_named(tmp_path):
    with pytest.raises(InputError, match="hidden_size"):
        Qwen3Config.from_hf({k: v for k, v in QWEN3.items() if k != "hidden_size"})
    with pytest.raises(InputError, match="config.json"):
        Qwen3Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3",\n oops')
    with pytest.raises(InputError, match=r"config.json:2"):
        Qwen3Config.from_hf(tmp_path)
