"""Batched sampling of prefixes with branches."""

from srrl_jax.sampling.sampler import Completion, Sampler, Weights
from srrl_jax.sampling.shapes import RowLengths
from srrl_jax.sampling.tokens import SamplingConfig

__all__ = ["Completion", "RowLengths", "Sampler", "SamplingConfig", "Weights"]
