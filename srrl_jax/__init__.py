"""Self-rewarding, rubric-based reinforcement learning for open-ended reasoning, in JAX.

The rooms (`srrl_jax.models`, `.sampling`, `.rubrics`, `.grading`, `.losses`, `.training`, ...) load when they
are first named, so that `srrl_jax.rubrics` alone does not import JAX.
"""

import importlib

__all__ = ["data", "grading", "losses", "models", "parallel", "rubrics", "sampling", "telemetry", "training"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"srrl_jax.{name}")
    raise AttributeError(f"module 'srrl_jax' has no attribute {name!r}")
