"""Self-rewarding, rubric-based reinforcement learning for open-ended reasoning, in JAX.

    import srrl_jax
    srrl_jax.train(srrl_jax.TrainConfig.load("demo", ["run_dir=runs/demo"]))

What is used most is here: `train` with `TrainConfig`, `load_model`, `Qwen3`, `Sampler`, `Grader`, and the
pure functions of `losses`. Each loads when it is first named, and so do the rooms (`srrl_jax.models`,
`.rubrics`, ...), so that `srrl_jax.rubrics` alone does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srrl_jax import (
        checkpoints,
        data,
        grading,
        losses,
        models,
        parallel,
        rubrics,
        run,
        sampling,
        telemetry,
        training,
    )
    from srrl_jax.checkpoints import load_model
    from srrl_jax.grading import Grader
    from srrl_jax.models import Qwen3
    from srrl_jax.run import train
    from srrl_jax.sampling import Sampler
    from srrl_jax.training import TrainConfig

_ROOMS = (
    "checkpoints",
    "data",
    "grading",
    "losses",
    "models",
    "parallel",
    "rubrics",
    "run",
    "sampling",
    "telemetry",
    "training",
)
_HOMES = {
    "Grader": "grading",
    "Qwen3": "models",
    "Sampler": "sampling",
    "load_model": "checkpoints",
    "TrainConfig": "training",
    "train": "run",
}
__all__ = [
    "Grader",
    "Qwen3",
    "Sampler",
    "TrainConfig",
    "checkpoints",
    "data",
    "grading",
    "load_model",
    "losses",
    "models",
    "parallel",
    "rubrics",
    "run",
    "sampling",
    "telemetry",
    "train",
    "training",
]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"srrl_jax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"srrl_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'srrl_jax' has no attribute {name!r}")
