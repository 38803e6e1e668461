"""What surrounds the algorithm of `srrl_jax.training`: checks, logs, checkpoints, signals, replay, export."""

from srrl_jax.run.launch import train

__all__ = ["train"]
