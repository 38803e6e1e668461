"""Batched sampling of prefixes with branches."""

from srrl_jax.sampling.buckets import Buckets
from srrl_jax.sampling.sampler import Completion, Sampler, Weights
from srrl_jax.sampling.score import score
from srrl_jax.sampling.tokens import SamplingConfig

__all__ = ["Buckets", "Completion", "Sampler", "SamplingConfig", "Weights", "score"]
