"""Qwen3 and its relatives in Flax NNX; prefixes with branches; weights in and out."""

from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.models.tree import TreeBatch, branch_logprobs

__all__ = ["Qwen3", "Qwen3Config", "TreeBatch", "branch_logprobs"]
