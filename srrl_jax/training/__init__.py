"""Self-rewarding GRPO: the loop and its recipe. `srrl_jax.train` runs it."""

from srrl_jax.training.config import TrainConfig
from srrl_jax.training.own import Group

__all__ = ["Group", "TrainConfig"]
