"""GGUF files: the config in their metadata and dequantized tensors under Hugging Face names.

Source: the file format and tensor names of llama.cpp, as its `gguf` package has them.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from srrl_jax.errors import InputError
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.files import Tensor

_ARCHITECTURES = ("qwen3", "qwen2", "llama")
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
}


def read(path: Path, config: Qwen3Config | None = None) -> tuple[Qwen3Config, dict[str, Tensor]]:
    """Opens a GGUF file of the qwen3, qwen2 or llama architecture.

    Args:
      path: the file.
      config: what a `config.json` beside it says; from the file's metadata when None.
    Returns:
      The config and the tensors, float32, by Hugging Face name (an unknown tensor keeps its own).
    Raises:
      InputError: an unreadable file, or metadata that this network does not compute.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # how the reader meets broken bytes
        raise InputError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from None
    field = reader.fields.get("general.architecture")
    architecture = field and field.contents()
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {architecture!r} is not supported; use one of {', '.join(_ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if config is None:
        config = _config(path, reader, architecture, tensors)
    elif config.model_type != architecture:
        raise InputError(
            f"{path}: architecture {architecture!r}, but config.json has model_type {config.model_type!r}"
        )
    # Llama files hold each head's q and k rows in pairs, for a RoPE of neighbouring dimensions.
    paired = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }
    result = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"blk\.\d+\.(\w+)\.(?:weight|bias)", name)
        heads = paired.get(layer[1]) if layer and architecture == "llama" else None
        result[_hf_name(name)] = _tensor(path, tensor, heads)
    return config, result


def _hf_name(name: str) -> str:
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        if layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    elif (top := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and top[1] in _NAMES:
        return f"{_NAMES[top[1]]}.{top[2]}"
    return name


def _tensor(path: Path, tensor, heads: int | None) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def read() -> np.ndarray:
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError:
            raise InputError(
                f"{path}: tensor {tensor.name!r} has quantization {tensor.tensor_type.name}, which "
                "the gguf package cannot undo; use another file of the model"
            ) from None
        return values if heads is None else unpermute(values, heads)

    return Tensor(path, shape, read)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's `permute`: q or k rows [heads * D, ...] from pairs to half-split order."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(path: Path, reader: GGUFReader, architecture: str, tensors: dict) -> Qwen3Config:
    prefix = architecture + "."
    fields: dict[str, Any] = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }

    by_layer = sorted(prefix + key for key, value in fields.items() if isinstance(value, list))
    if by_layer:
        raise InputError(f"{path}: {', '.join(by_layer)} differ by layer, which is not supported")

    def decimal(value: float) -> float:
        """The shortest decimal of a float32, such as 1e-6 for 9.99999997e-07."""
        return float(str(np.float32(value)))

    try:
        heads = fields.pop("attention.head_count")
        hf = {
            "model_type": architecture,
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": fields.pop("embedding_length"),
            "intermediate_size": fields.pop("feed_forward_length"),
            "num_hidden_layers": fields.pop("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.pop("attention.head_count_kv", heads),
            "max_position_embeddings": fields.pop("context_length"),
            "rms_norm_eps": decimal(fields.pop("attention.layer_norm_rms_epsilon")),
            "rope_theta": decimal(fields.pop("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        }
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
    }
    odd = sorted(prefix + key for key, value in fields.items() if harmless.get(key) != value)
    if odd:
        raise InputError(
            f"{path}: metadata {', '.join(odd)} is not supported, so the weights might be run "
            "wrongly; use another checkpoint"
        )
    return Qwen3Config.from_hf(hf)
