"""Self-rewarding GRPO: the loop, its state and its recipe."""

from srrl_jax.training.config import TrainConfig
from srrl_jax.training.loop import train
from srrl_jax.training.own import Group

__all__ = ["Group", "TrainConfig", "train"]
