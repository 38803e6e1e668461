"""GGUF files: the config in their metadata and dequantized tensors under Hugging Face names.

Source: the file format and tensor names of llama.cpp, as its `gguf` package has them.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from srrl_jax.checkpoints.files import Box, Tensor
from srrl_jax.errors import InputError
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.rope import RopeScaling, frequencies

# model_type of transformers by architecture.
_MODEL_TYPES = {"qwen3": "qwen3", "qwen3moe": "qwen3_moe", "qwen2": "qwen2", "llama": "llama"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


class _Reader(GGUFReader):
    """Says which tensor does not lie in the file as its header has it."""

    def _build_tensors(self, start_offs, fields) -> None:
        for field in fields:
            try:
                super()._build_tensors(start_offs, [field])
            except ValueError as error:
                raise ValueError(f"tensor {field.name!r}: {error}") from None
        super()._build_tensors(start_offs, fields)


def read(path: Path, config: Qwen3Config | None = None) -> tuple[Qwen3Config, dict[str, Tensor]]:
    """Opens a GGUF file of the qwen3, qwen3moe, qwen2 or llama architecture.

    Args:
      path: the file.
      config: what a `config.json` beside it says; from the file's metadata when None.
    Returns:
      The config and the tensors by Hugging Face name (an unknown tensor keeps its own).
    Raises:
      InputError: an unreadable file (names the tensor that is cut short), or metadata that this
        network does not compute.
    """
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError) as error:  # how the reader meets broken bytes
        raise InputError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from None
    field = reader.fields.get("general.architecture")
    architecture = field and field.contents()
    if architecture not in _MODEL_TYPES:
        raise InputError(
            f"{path}: architecture {architecture!r} is not supported; use one of {', '.join(_MODEL_TYPES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config_given = config is not None
    if config is None:
        config = _config(path, reader, architecture, tensors)
    elif config.model_type != _MODEL_TYPES[architecture]:
        raise InputError(
            f"{path}: architecture {architecture!r}, but config.json has model_type {config.model_type!r}"
        )
    result = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            config = _with_factors(
                path, config, np.asarray(tensor.data, np.float32).reshape(-1), config_given
            )
        else:
            result |= _tensors(path, tensor, config)
    return config, result


def _tensors(path: Path, tensor: ReaderTensor, config: Qwen3Config) -> dict[str, Tensor]:
    """The tensors of a Hugging Face checkpoint that a tensor of the file holds: one, or one an expert."""
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name):
        number, name, kind = layer.groups()
        if name in _LAYER_NAMES:
            # Llama files hold each head's q and k rows in pairs, for a RoPE of neighbouring dimensions.
            paired = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            heads = paired.get(name) if config.model_type == "llama" else None
            return {f"model.layers.{number}.{_LAYER_NAMES[name]}.{kind}": _tensor(path, tensor, heads=heads)}
        if name in _EXPERT_NAMES:
            return {
                f"model.layers.{number}.mlp.experts.{i}.{_EXPERT_NAMES[name]}.{kind}": _tensor(
                    path, tensor, (i,)
                )
                for i in range(len(tensor.data))
            }
    elif (top := re.fullmatch(r"(\w+)\.(weight|bias)", tensor.name)) and top[1] in _NAMES:
        return {f"{_NAMES[top[1]]}.{top[2]}": _tensor(path, tensor)}
    return {tensor.name: _tensor(path, tensor)}


def _tensor(
    path: Path, tensor: ReaderTensor, index: tuple[int, ...] = (), heads: int | None = None
) -> Tensor:
    """The part of `tensor` at `index`."""
    shape = tuple(int(size) for size in reversed(tensor.shape))[len(index) :]

    def read(box: Box, out: np.ndarray) -> None:
        # A map of its own, which is closed again, and of it only the rows in `box`, where they are in order.
        stored = np.memmap(path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)[index]
        rows = box[0] if len(shape) > 1 and heads is None else slice(0, shape[0])
        try:
            values = dequantize(stored[rows] if len(shape) > 1 else stored, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {tensor.name!r} has quantization {tensor.tensor_type.name}, which "
                "the gguf package cannot undo; use another file of the model"
            ) from None
        if heads is not None:
            values = unpermute(values, heads)
        first, *rest = box
        out[...] = values[first.start - rows.start : first.stop - rows.start, *rest]

    return Tensor(path, shape, read)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's `permute`: q or k rows [heads * D, ...] from pairs to half-split order."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(path: Path, reader: _Reader, architecture: str, tensors: dict) -> Qwen3Config:
    prefix = architecture + "."
    fields: dict[str, Any] = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }

    by_layer = sorted(prefix + key for key, value in fields.items() if isinstance(value, list))
    if by_layer:
        raise InputError(f"{path}: {', '.join(by_layer)} differ by layer, which is not supported")

    try:
        heads = fields.pop("attention.head_count")
        hf = {
            "model_type": _MODEL_TYPES[architecture],
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": fields.pop("embedding_length"),
            "intermediate_size": fields.pop("feed_forward_length"),
            "num_hidden_layers": fields.pop("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.pop("attention.head_count_kv", heads),
            "max_position_embeddings": fields.pop("context_length"),
            "rms_norm_eps": _decimal(fields.pop("attention.layer_norm_rms_epsilon")),
            "rope_theta": _decimal(fields.pop("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        }
        if architecture == "qwen3moe":
            hf |= {
                "num_experts": fields.pop("expert_count"),
                "num_experts_per_tok": fields.pop("expert_used_count"),
                "moe_intermediate_size": fields.pop("expert_feed_forward_length"),
                "norm_topk_prob": True,  # llama.cpp always does so for this architecture
            }
        if fields.get("rope.scaling.type") in ("linear", "yarn"):
            hf["rope_parameters"] = _rope(fields) | {"rope_theta": hf.pop("rope_theta")}
    except KeyError as error:
        raise InputError(
            f"{path}: {error.args[0]!r} is missing; convert the model again with llama.cpp"
        ) from None
    head_dim = hf["head_dim"] = fields.pop("attention.key_length", hf["hidden_size"] // heads)
    harmless = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": hf["vocab_size"],
        "rope.scaling.type": "none",
        "rope.scaling.attn_factor": 1.0,
    }
    odd = sorted(prefix + key for key, value in fields.items() if harmless.get(key) != value)
    if odd:
        raise InputError(
            f"{path}: metadata {', '.join(odd)} is not supported, so the weights might be run "
            "wrongly; use another checkpoint"
        )
    return Qwen3Config.from_hf(hf, where=str(path))


def _with_factors(path: Path, config: Qwen3Config, factors: np.ndarray, given: bool) -> Qwen3Config:
    """The config whose frequencies are the plain ones over `factors` [head_dim / 2].

    llama.cpp's convert_hf_to_gguf.py writes Llama 3's rope type in this way alone, so its parameters are
    taken from the factors, low_freq_factor and high_freq_factor being 1 and 4 as in every Llama 3.

    Args:
      given: the config has its rope from a `config.json`, which is to agree.
    Raises:
      InputError: the factors are not Llama 3's, or not those of the `config.json`.
    """
    plain = frequencies(config.head_dim, config.rope_theta, None)
    if factors.shape == plain.shape and not given and config.rope_scaling is None and factors.max() > 1:
        factor, wavelength = float(factors.max()), 2 * math.pi / plain.astype(np.float64)
        between = (factors > 1) & (factors < factor)
        kept = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        if between.any():
            length = np.median((wavelength * (1 + 3 * kept))[between])
        else:  # between four times the longest that is kept and the shortest that is stretched
            length = math.sqrt(
                wavelength[factors == factor].min() * 4 * max(wavelength[factors == 1], default=1)
            )
        scaling = RopeScaling("llama3", _decimal(factor), round(length))
        config = dataclasses.replace(config, rope_scaling=scaling)
    scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if factors.shape != plain.shape or not np.allclose(plain / factors, scaled, rtol=1e-4):
        what = "differs from the rope of config.json" if given else "is not of Llama 3's rope type"
        raise InputError(f"{path}: tensor 'rope_freqs.weight' {what}; use another checkpoint")
    return config


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Takes linear or yarn scaling out of `fields`, as the rope parameters of transformers."""
    rope = {
        "rope_type": fields.pop("rope.scaling.type"),
        "factor": _decimal(fields.pop("rope.scaling.factor")),
    }
    fields.pop("rope.scaling.finetuned", None)  # how the model was made, not how it is run
    if rope["rope_type"] == "yarn":
        names = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        rope |= {
            theirs: _decimal(fields.pop(f"rope.scaling.{ours}"))
            for ours, theirs in names.items()
            if f"rope.scaling.{ours}" in fields
        }
    return rope


def _decimal(value: float) -> float:
    """The shortest decimal of a float32, such as 1e-6 for 9.99999997e-07."""
    return float(str(np.float32(value)))
