"""Qwen3 and its relatives in Flax NNX, over prefixes with branches."""

from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.presets import preset
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.models.tree import TreeBatch, branch_logprobs

__all__ = ["Qwen3", "Qwen3Config", "TreeBatch", "branch_logprobs", "preset"]
