"""Self-rewarding GRPO: the loop, its state and its recipe."""

from srrl_jax.training.config import TrainConfig
from srrl_jax.training.loop import train

__all__ = ["TrainConfig", "train"]
