"""What a Hugging Face `config.json` says about the network."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Self

import numpy as np
from etils import epath

from srrl_jax.errors import InputError
from srrl_jax.models.rope import RopeScaling, read_rope

_UNBOUNDED = 2**30  # a window that holds any sequence

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Fields that cannot change a forward pass in inference or RL, or that only transformers uses.
_IGNORED = frozenset(
    "architectures attention_dropout bos_token_id dtype eos_token_id initializer_range "
    "is_llama_config pad_token_id pretraining_tp return_dict rope_interleaved "
    "torch_dtype transformers_version use_cache transformers.js_config _name_or_path "
    "output_attentions output_hidden_states chunk_size_feed_forward is_encoder_decoder "
    "id2label label2id problem_type tokenizer_class".split()
)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Layers whose MLP is a mixture of experts; field names are those of `transformers`.

    `mlp_only_layers` are the layers without experts, those that `decoder_sparse_step` leaves out among
    them. `norm_topk_prob` makes the weights of a token's experts add up to 1.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"config.json: num_experts_per_tok ({self.num_experts_per_tok}) must not be over num_experts "
                f"({self.num_experts})"
            )


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes and switches of the network; field names are those of `transformers`.

    `rope_scaling` stretches RoPE. `layer_types` names each layer's attention, "full_attention" or
    "sliding_attention", where a token sees itself and the `sliding_window` - 1 before it; both None
    where no layer slides. `qk_norm`, `qkv_bias` and `o_bias` let the one network run Qwen3 (norm, no
    bias), Qwen2 (no norm, q/k/v bias) and Llama (neither) checkpoints. `moe` is that of Qwen3-MoE.
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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    moe: MoEConfig | None = None
    model_type: str = "qwen3"

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim ({self.head_dim}) must be even for RoPE")
        if self.layer_types is not None:
            self._check_layer_types()

    def _check_layer_types(self) -> None:
        types = self.layer_types or ()
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise InputError(
                f"config.json: layer_types {', '.join(unknown)} are not supported, only full_attention and "
                "sliding_attention"
            )
        if len(types) != self.num_hidden_layers:
            raise InputError(
                f"config.json: layer_types names {len(types)} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if self.model_type == "llama":
            raise InputError("config.json: sliding attention (layer_types) is not part of llama")
        if self.sliding_window is None or self.sliding_window < 1:
            raise InputError(
                "config.json: layer_types has sliding_attention, which needs use_sliding_window true and a "
                f"positive sliding_window, not {self.sliding_window}"
            )

    @property
    def windows(self) -> np.ndarray | None:
        """int32 [layers], how many tokens a token sees in each layer; None where no layer slides."""
        if self.layer_types is None:
            return None
        sizes = {"full_attention": _UNBOUNDED, "sliding_attention": self.sliding_window}
        return np.array([sizes[kind] for kind in self.layer_types], np.int32)

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Of each layer, whether its MLP is a mixture of experts."""
        dense = range(self.num_hidden_layers) if self.moe is None else self.moe.mlp_only_layers
        return tuple(layer not in dense for layer in range(self.num_hidden_layers))

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | Path, where: str = "config.json") -> Self:
        """Reads a parsed `config.json`, its path (here or gs://), or that of the directory that holds it.

        Args:
          source: fields, or a path.
          where: the file that fields are from, for messages.

        Raises:
          InputError: a required field is missing or no number, or a field asks for something that this
            network does not compute (the message names the field).
        """
        if not isinstance(source, dict):
            path = epath.Path(source)
            path = path / "config.json" if path.is_dir() else path
            where = str(path)
            try:
                source = json.loads(path.read_text())
            except FileNotFoundError:
                raise InputError(f"{path}: no such file; give a checkpoint directory") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        if not isinstance(source, dict):
            raise InputError(f"{where}: must hold a JSON object; fetch it again")
        fields = dict(source)

        model_type = fields.pop("model_type", None)
        if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
            raise InputError(
                f"{where}: model_type {model_type!r} is not supported; use a checkpoint of "
                f"{', '.join(_ARCHITECTURES)}"
            )

        def take(name: str, kind: type = int, default: Any = None) -> Any:
            return _take(fields, name, where, kind, default)

        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
        sizes = {name: take(name) for name in names}
        heads, hidden, layers = (sizes[name] for name in (names[4], names[1], names[3]))
        llama = model_type == "llama"
        # Where the file is silent, the defaults of transformers; null is one head for each query head.
        silent = {"llama": heads, "qwen3_moe": 4}.get(model_type, 32)
        kv_heads = silent if "num_key_value_heads" not in fields else heads
        positions = take("max_position_embeddings", default=2048 if llama else 32768)
        bias = take("attention_bias", bool, False)
        theta, scaling = read_rope(fields, positions, where)
        sliding = _sliding_moe if model_type == "qwen3_moe" else _sliding
        window, layer_types = sliding(fields, layers, where)
        try:
            config = cls(
                **sizes,
                num_key_value_heads=take("num_key_value_heads", default=kv_heads),
                head_dim=take("head_dim", default=128 if model_type == "qwen3" else hidden // heads),
                rms_norm_eps=take("rms_norm_eps", float, 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                sliding_window=window,
                layer_types=layer_types,
                max_position_embeddings=positions,
                tie_word_embeddings=take("tie_word_embeddings", bool, False),
                qk_norm=model_type in ("qwen3", "qwen3_moe"),
                qkv_bias=bias or model_type == "qwen2",
                o_bias=bias and model_type != "qwen2",
                moe=_read_moe(fields, layers, where) if model_type == "qwen3_moe" else None,
                model_type=model_type,
            )
        except InputError as error:  # of the config's own checks, which know no path
            raise InputError(str(error).replace("config.json", where, 1)) from None
        _refuse_what_is_left(fields, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers` reads for these weights."""
        fields = dataclasses.asdict(self)
        for name in "qk_norm qkv_bias o_bias rope_theta rope_scaling sliding_window layer_types moe".split():
            del fields[name]
        if self.model_type != "qwen2":
            fields["attention_bias"] = self.qkv_bias
        if self.layer_types is not None:
            fields["use_sliding_window"] = True
            fields["sliding_window"] = self.sliding_window
            if self.moe is None:
                fields["layer_types"] = list(self.layer_types)
        if self.moe is not None:
            fields |= dataclasses.asdict(self.moe)
            fields |= {"mlp_only_layers": list(self.moe.mlp_only_layers), "decoder_sparse_step": 1}
        rope = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_hf()
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            **fields,
            "hidden_act": "silu",
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
        }


def _take(fields: dict[str, Any], name: str, where: str, kind: type = int, default: Any = None) -> Any:
    """Takes a field out of `fields`; `default` where it is missing or null, and that is None an error.

    Args:
      kind: int is a whole number from 1 on, float a number from 0 on, bool true or false.
    """
    value = fields.pop(name, None)
    if value is None and default is None:
        raise InputError(f"{where}: field {name!r} is missing; take it from the model's own config.json")
    value = default if value is None else value
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, wanted = type(value) is int and 0 < value < 2**31, "a whole number from 1 on"
    else:
        fits, wanted = type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 on"
    if not fits:
        raise InputError(
            f"{where}: {name} must be {wanted}, not {value!r}; take it from the model's own config.json"
        )
    return kind(value)


def _sliding(fields: dict[str, Any], layers: int, where: str) -> tuple[int | None, tuple[str, ...] | None]:
    """Takes the window and the layers' kinds out of `fields`, as Qwen3Config of transformers 5.23 does."""
    used, window = _window(fields, where)
    first = fields.pop("max_window_layers", 28)
    kinds = fields.pop("layer_types", None)
    if used and type(first) is not int:
        raise InputError(f"{where}: max_window_layers must be a whole number, not {first!r}")
    if kinds is None:
        kinds = [
            "sliding_attention" if used and layer >= first else "full_attention" for layer in range(layers)
        ]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise InputError(f"{where}: layer_types must be a list of names, not {kinds!r}")
    return (None, None) if kinds == ["full_attention"] * layers else (window, tuple(kinds))


def _sliding_moe(
    fields: dict[str, Any], layers: int, where: str
) -> tuple[int | None, tuple[str, ...] | None]:
    """As `_sliding`, for Qwen3-MoE: there every layer slides or none, whatever max_window_layers says."""
    used, window = _window(fields, where)
    fields.pop("max_window_layers", None)
    return (window, ("sliding_attention",) * layers) if used else (None, None)


def _window(fields: dict[str, Any], where: str) -> tuple[bool, int | None]:
    """Whether layers slide, and the window; none where it is null or not used."""
    null = fields.get("sliding_window", 4096) is None
    window = _take(fields, "sliding_window", where, default=4096)
    used = _take(fields, "use_sliding_window", where, bool, False) and not null
    return used, window if used else None


def _read_moe(fields: dict[str, Any], layers: int, where: str) -> MoEConfig:
    """Takes the experts out of `fields`; where the file is silent, the defaults of transformers."""
    # Published files say num_experts, transformers 5 writes num_local_experts.
    names = [name for name in ("num_experts", "num_local_experts") if name in fields] or ["num_experts"]
    counts = {_take(fields, name, where, default=128) for name in names}
    if len(counts) > 1:
        raise InputError(f"{where}: num_experts and num_local_experts differ; keep one")
    step = _take(fields, "decoder_sparse_step", where, default=1)
    dense = fields.pop("mlp_only_layers", None) or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise InputError(f"{where}: mlp_only_layers must be a list of whole numbers, not {dense!r}")
    fields.pop("output_router_logits", None)  # an output of transformers, not a change of the network
    return MoEConfig(
        num_experts=counts.pop(),
        num_experts_per_tok=_take(fields, "num_experts_per_tok", where, default=8),
        moe_intermediate_size=_take(fields, "moe_intermediate_size", where, default=768),
        norm_topk_prob=_take(fields, "norm_topk_prob", where, bool, False),
        mlp_only_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % step),
        router_aux_loss_coef=_take(fields, "router_aux_loss_coef", where, float, 0.001),
    )


def _check_positive(config: Any) -> None:
    for field in dataclasses.fields(config):
        if field.type is int and getattr(config, field.name) < 1:
            raise InputError(f"config.json: {field.name} ({getattr(config, field.name)}) must be positive")


def _refuse_what_is_left(fields: dict[str, Any], where: str) -> None:
    if fields.pop("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act other than 'silu' is not supported")
    if fields.pop("mlp_bias", False):
        raise InputError(f"{where}: mlp_bias is not supported")
    if fields.pop("use_mrope", False):  # Qwen2.5 checkpoints say false
        raise InputError(f"{where}: use_mrope is not supported")
    if fields.pop("quantization_config", None):
        raise InputError(
            f"{where}: quantization_config: quantized safetensors are not supported; use the bfloat16 "
            "checkpoint or a GGUF file"
        )
    unknown = sorted(set(fields) - _IGNORED)
    if unknown:
        raise InputError(
            f"{where}: field(s) {', '.join(unknown)} are not understood, so the weights might be "
            "run wrongly; remove them if they do not change the forward pass"
        )
