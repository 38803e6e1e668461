"""What a Hugging Face `config.json` says about the network."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from srrl_jax.errors import InputError

# Fields that cannot change a forward pass in inference or RL, or that only transformers uses.
_IGNORED = frozenset(
    "architectures attention_dropout bos_token_id dtype eos_token_id initializer_range "
    "is_llama_config max_window_layers pad_token_id pretraining_tp return_dict rope_interleaved "
    "torch_dtype transformers_version use_cache transformers.js_config _name_or_path "
    "output_attentions output_hidden_states chunk_size_feed_forward is_encoder_decoder "
    "id2label label2id problem_type tokenizer_class".split()
)


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes and switches of the network; field names are those of `transformers`.

    `qk_norm`, `qkv_bias` and `o_bias` let the one network run Qwen3 (norm, no bias), Qwen2
    (no norm, q/k/v bias) and Llama (neither) checkpoints.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    model_type: str = "qwen3"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim ({self.head_dim}) must be even for RoPE")

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | Path) -> Self:
        """Reads a parsed `config.json`, its path, or the path of the directory that holds it.

        Raises:
          InputError: a required field is missing, or a field asks for something that this
            network does not compute (the message names the field).
        """
        where = "config.json"
        if not isinstance(source, dict):
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            where = str(path)
            try:
                source = json.loads(path.read_text())
            except FileNotFoundError:
                raise InputError(f"{path}: no such file; give a checkpoint directory") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        fields = dict(source)

        model_type = fields.pop("model_type", None)
        if model_type not in ("qwen3", "qwen2", "llama"):
            raise InputError(
                f"{where}: model_type {model_type!r} is not supported; use a qwen3, qwen2 or llama checkpoint"
            )
        try:
            sizes = {
                name: int(fields.pop(name))
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                )
            }
        except KeyError as error:
            raise InputError(f"{where}: field {error.args[0]!r} is missing") from None
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        bias = bool(fields.pop("attention_bias", False))
        config = cls(
            **sizes,
            num_key_value_heads=int(fields.pop("num_key_value_heads", None) or heads),
            # 128 is what transformers takes for Qwen3 when the file is silent.
            head_dim=int(fields.pop("head_dim", None) or (128 if model_type == "qwen3" else hidden // heads)),
            rms_norm_eps=float(fields.pop("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(fields, where),
            max_position_embeddings=int(fields.pop("max_position_embeddings", 32768)),
            tie_word_embeddings=bool(fields.pop("tie_word_embeddings", False)),
            qk_norm=model_type == "qwen3",
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias and model_type != "qwen2",
            model_type=model_type,
        )
        _refuse_what_is_left(fields, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers` reads for these weights."""
        architecture = {
            "qwen3": "Qwen3ForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "llama": "LlamaForCausalLM",
        }[self.model_type]
        fields = dataclasses.asdict(self)
        for name in ("qk_norm", "qkv_bias", "o_bias", "rope_theta"):
            del fields[name]
        if self.model_type != "qwen2":
            fields["attention_bias"] = self.qkv_bias
        return {
            "architectures": [architecture],
            **fields,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


def _rope_theta(fields: dict[str, Any], where: str) -> float:
    """Takes the RoPE fields out of `fields`: the flat form, or the nested one of transformers 5."""
    theta = fields.pop("rope_theta", None)
    nested = {
        **(fields.pop("rope_scaling", None) or {}),
        **(fields.pop("rope_parameters", None) or {}),
    }
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    theta = nested.pop("rope_theta", theta)
    if kind != "default" or nested:
        raise InputError(
            f"{where}: rope type {kind!r} with {sorted(nested)} is not supported; only 'default' is"
        )
    # The default of transformers for all three families when the file is silent.
    return float(10000.0 if theta is None else theta)


def _refuse_what_is_left(fields: dict[str, Any], where: str) -> None:
    if fields.pop("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act other than 'silu' is not supported")
    if fields.pop("mlp_bias", False):
        raise InputError(f"{where}: mlp_bias is not supported")
    if fields.pop("use_mrope", False):  # Qwen2.5 checkpoints say false
        raise InputError(f"{where}: use_mrope is not supported")
    window = fields.pop("sliding_window", None)
    if fields.pop("use_sliding_window", False) and window is not None:
        raise InputError(f"{where}: use_sliding_window is not supported")
    if set(fields.pop("layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise InputError(f"{where}: layer_types other than 'full_attention' are not supported")
    unknown = sorted(set(fields) - _IGNORED)
    if unknown:
        raise InputError(
            f"{where}: field(s) {', '.join(unknown)} are not understood, so the weights might be "
            "run wrongly; remove them if they do not change the forward pass"
        )
