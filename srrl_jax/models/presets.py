"""The published Qwen3 sizes, dense and mixtures of experts, as their `config.json` has them.

Base models were trained to 32,768 positions and say so; these are the post-trained ones.
"""

import dataclasses

from srrl_jax.errors import InputError
from srrl_jax.models.config import MoEConfig, Qwen3Config


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


def _qwen3_moe(hidden: int, intermediate: int, layers: int, heads: int, expert: int) -> Qwen3Config:
    return dataclasses.replace(
        _qwen3(hidden, intermediate, layers, heads),
        num_key_value_heads=4,
        moe=MoEConfig(
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=expert, norm_topk_prob=True
        ),
        model_type="qwen3_moe",
    )


PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, 32, expert=768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 94, 64, expert=1536),
}


def preset(name: str) -> Qwen3Config:
    """The config of a published size, such as "qwen3-8b".

    Raises:
      InputError: no preset has that name.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} does not exist; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
