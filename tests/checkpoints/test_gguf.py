"""GGUF files, written here by llama.cpp's package with its row order."""

import math
import re

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from srrl_jax.checkpoints import gguf as ours
from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config, rope

ARCHITECTURES = {
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def fields_of(model_type):
    return EXPERTS if model_type == "qwen3_moe" else {}


def merge_experts(tensors):
    """One tensor for the experts of a layer, as llama.cpp's convert_hf_to_gguf.py makes it."""
    merged = {}
    for name, values in tensors.items():
        merged.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append((name, values))
    number = re.compile(r"experts\.(\d+)")
    return {
        name: np.stack(
            [values for _, values in sorted(parts, key=lambda part: int(number.search(part[0])[1]))]
        )
        if "experts" in name
        else parts[0][1]
        for name, parts in merged.items()
    }


def permute(weights, heads):
    """As llama.cpp's convert_hf_to_gguf.py writes q and k of Llama models."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def blocks(values, quantization):
    """Quantized rows; random ones where the gguf package can only read the type."""
    try:
        return gguf.quants.quantize(values, quantization)
    except NotImplementedError:
        shape = gguf.quants.quant_shape_to_byte_shape(values.shape, quantization)
        return np.random.default_rng(0).integers(0, 60, shape, np.uint8)


@pytest.fixture
def write(tmp_path):
    """Writes a model as GGUF; names come from the gguf package's own map."""

    def write(model: Qwen3, quantization=None, metadata=(), extra=(), name="model.gguf"):
        c = model.config
        save_model(model, tmp_path / "hf")
        folder = tmp_path / "gguf"
        folder.mkdir(exist_ok=True)
        writer = gguf.GGUFWriter(folder / name, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[c.model_type]])
        writer.add_block_count(c.num_hidden_layers)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        if c.moe is not None:
            writer.add_expert_count(c.moe.num_experts)
            writer.add_expert_used_count(c.moe.num_experts_per_tok)
            writer.add_expert_feed_forward_length(c.moe.moe_intermediate_size)
        for key, value in dict(metadata).items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        names = gguf.get_tensor_name_map(ARCHITECTURES[c.model_type], c.num_hidden_layers)
        tensors = merge_experts(load_file(tmp_path / "hf" / "model.safetensors"))
        for hf_name, values in tensors.items():
            if c.model_type == "llama" and "q_proj" in hf_name:
                values = permute(values, c.num_attention_heads)
            if c.model_type == "llama" and "k_proj" in hf_name:
                values = permute(values, c.num_key_value_heads)
            gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if quantization and values.ndim > 1:
                values = blocks(values, quantization)
                writer.add_tensor(gguf_name, values, raw_dtype=quantization)
            else:
                writer.add_tensor(gguf_name, values)
        for extra_name in extra:
            values = extra[extra_name] if isinstance(extra, dict) else np.ones(8, np.float32)
            writer.add_tensor(extra_name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder

    return write


def test_a_file_in_an_object_store_is_loaded_like_one_on_a_disk(tiny, write, bucket):
    folder = write(tiny())
    for file in folder.iterdir():
        (bucket / file.name).write_bytes(file.read_bytes())
    here, there = load_model(folder), load_model(str(bucket))
    assert there.config == here.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(here), nnx.state(there))


def weights(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_unquantized_is_bit_identical(tiny, write, model_type, tied):
    fields = dict(tie_word_embeddings=tied, rms_norm_eps=1e-5, rope_theta=5e5)
    model = tiny(model_type, **fields, **fields_of(model_type))
    loaded = load_model(write(model))
    assert loaded.config == model.config
    expected, actual = weights(model), weights(loaded)
    assert expected.keys() == actual.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=str(path))


def test_llama_bias_rows_are_unpermuted_too(tiny, write):
    model = tiny("llama")
    fields = {**model.config.to_hf(), "attention_bias": True}
    model = tiny(**fields)
    loaded = weights(load_model(write(model)))
    for path, values in weights(model).items():
        np.testing.assert_array_equal(loaded[path], values, err_msg=str(path))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_quantized_is_close(tiny, write, model_type):
    """Q8_0 keeps 8 bits of the largest of each 32 values: within 1/254 of it, and float16 scales."""
    model = tiny(model_type, hidden_size=64, intermediate_size=96, **fields_of(model_type))
    loaded = weights(load_model(write(model, gguf.GGMLQuantizationType.Q8_0)))
    changed = False
    for path, values in weights(model).items():
        error = np.abs(loaded[path] - values).max()
        assert error <= np.abs(values).max() / 250
        changed |= error > 0
    assert changed


def test_config_json_comes_first(tiny, write):
    model = tiny("llama")
    folder = write(model)
    (folder / "config.json").write_text((folder.parent / "hf" / "config.json").read_text())
    assert load_model(folder).config == model.config
    text = (folder / "config.json").read_text().replace('"llama"', '"qwen2"')
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="'llama', but config.json has model_type 'qwen2'"):
        load_model(folder)


@pytest.mark.parametrize(
    "metadata, extra, message",
    [
        ({}, ["rope_freqs.bias"], "model.gguf.*rope_freqs.bias"),
        ({}, ["blk.0.ffn_gate_exps.weight"], "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ({"llama.rope.scaling.type": "longrope"}, [], "llama.rope.scaling.type"),
        ({"llama.rope.scaling.type": "yarn"}, [], "'rope.scaling.factor' is missing"),
        ({"llama.rope.scaling.attn_factor": 2.0}, [], "rope.scaling.attn_factor"),
        ({"llama.attention.sliding_window": 64}, [], "sliding_window"),
        ({"llama.rope.dimension_count": 8}, [], "dimension_count"),
    ],
)
def test_refuses_what_it_does_not_compute(tiny, write, metadata, extra, message):
    with pytest.raises(InputError, match=message):
        load_model(write(tiny("llama"), metadata=metadata, extra=extra))


def test_plain_rope_metadata_is_accepted(tiny, write):
    metadata = {"llama.rope.scaling.type": "none", "llama.rope.dimension_count": 16}
    load_model(write(tiny("llama"), metadata=metadata))


@pytest.mark.parametrize(
    "metadata, parameters",
    [
        ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 8192, "finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 20.0, "yarn_beta_slow": 1.1},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 1.1},
        ),
    ],
)
def test_rope_scaling(tiny, write, metadata, parameters):
    model = tiny("qwen3", rope_parameters={**parameters, "rope_theta": 5e5})
    folder = write(model, metadata={f"qwen3.rope.scaling.{key}": value for key, value in metadata.items()})
    assert load_model(folder).config == model.config


def llama3_factors(head_dim, theta, factor, length, low=1.0, high=4.0):
    """As llama.cpp's convert_hf_to_gguf.py computes them, in Python's floats."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("factor", "length", "head_dim", "theta"),
    [(8.0, 8192, 128, 5e5), (32.0, 8192, 64, 5e5), (32.0, 8192, 16, 5e5), (4.0, 1000, 8, 1e4)],
)
def test_llama_3s_factors_are_read_back_as_its_rope_type(tiny, write, factor, length, head_dim, theta):
    """Llama 3.1 and 3.2 in their own sizes come back exactly; few dimensions leave the length open."""
    parameters = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": length,
                  "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": theta}  # fmt: skip
    model = tiny("llama", rope_parameters=parameters, head_dim=head_dim)
    factors = llama3_factors(head_dim, theta, factor, length)
    folder = write(model, extra={"rope_freqs.weight": factors})
    found = load_model(folder).config
    if head_dim >= 16:
        assert found == model.config
    frequencies = [rope.frequencies(head_dim, theta, c.rope_scaling) for c in (found, model.config)]
    np.testing.assert_allclose(*frequencies, rtol=1e-6)
    (folder / "config.json").write_text((folder.parent / "hf" / "config.json").read_text())
    assert load_model(folder).config == model.config


def test_other_factors_are_refused(tiny, write):
    model = tiny("llama", rope_theta=5e5)
    factors = llama3_factors(16, 5e5, 8.0, 8192)
    for wrong in (factors[::-1], factors[:4], factors * 2):
        folder = write(model, extra={"rope_freqs.weight": np.ascontiguousarray(wrong)})
        with pytest.raises(InputError, match="'rope_freqs.weight' is not of Llama 3's rope type"):
            load_model(folder)
    folder = write(model, extra={"rope_freqs.weight": factors})
    (folder / "config.json").write_text((folder.parent / "hf" / "config.json").read_text())
    with pytest.raises(InputError, match="'rope_freqs.weight' differs from the rope of config.json"):
        load_model(folder)


@pytest.mark.parametrize(
    "name",
    ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
     "IQ4_NL", "IQ4_XS"],
)  # fmt: skip
def test_a_box_of_any_quantization(tiny, write, name):
    """Rows and columns out of a tensor are those of the whole, as the gguf package has it."""
    kind = gguf.GGMLQuantizationType[name]
    model = tiny(hidden_size=256, intermediate_size=256, num_attention_heads=16, num_hidden_layers=1)
    file = write(model, kind) / "model.gguf"
    tensors = ours.read(file)[1]
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "blk.0.attn_k.weight":
            expected = gguf.quants.dequantize(tensor.data, kind)[3:17, 40:200]
    actual = np.empty((14, 160), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"].read(np.s_[3:17, 40:200], actual)
    np.testing.assert_array_equal(actual, expected)
    assert np.unique(expected).size > 8


def test_a_tensor_cut_short_is_named(tiny, write):
    file = write(tiny("qwen3")) / "model.gguf"
    last = max(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.data_offset).name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"model.gguf: truncated .*tensor '{last}'"):
        load_model(file.parent)


def test_other_architecture(tiny, write, tmp_path):
    file = write(tiny("llama")) / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"bloom", 1))
    with pytest.raises(InputError, match="architecture 'bloom'"):
        load_model(file.parent)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 5000, -100])
def test_truncated_file(tiny, write, keep):
    file = write(tiny("llama")) / "model.gguf"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.gguf: truncated"):
        load_model(file.parent)


def test_several_files(tiny, write):
    write(tiny("llama"), name="a.gguf")
    folder = write(tiny("llama"), name="b.gguf")
    with pytest.raises(InputError, match="several GGUF files.*'a.gguf', 'b.gguf'"):
        load_model(folder)


@pytest.mark.slow
def test_smollm2_metadata_says_what_its_config_says(smollm2, tmp_path):
    config, tensors = ours.read(next(smollm2.glob("*.gguf")))
    assert config == Qwen3Config.from_hf(smollm2)
    assert len(tensors) == 272
