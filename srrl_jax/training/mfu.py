"""How much of the chips' peak the update uses."""

from collections.abc import Sequence

import jax

from srrl_jax.models import Qwen3Config, counts
from srrl_jax.models.counts import Tree
from srrl_jax.parallel.chips import peak_flops
from srrl_jax.sampling import Completion
from srrl_jax.training.experience import Task


def update_mfu(
    model: Qwen3Config,
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    seconds: float,
    adapters: bool,
) -> dict[str, float]:
    """`perf/mfu` of a step's updates, which took `seconds`; nothing on devices of unknown peak, such as CPUs.

    Against the bfloat16 peak of all devices, whatever type the run computes in.
    """
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return {}
    prompts = [len(task.prompt) for task in tasks]
    completions = [[len(completion.tokens) for completion in group] for group in groups]
    flops = model_flops(model, prompts, completions, adapters)
    return {"perf/mfu": flops / (seconds * jax.device_count() * peak)}


def model_flops(
    model: Qwen3Config, prompts: Sequence[int], completions: Sequence[Sequence[int]], adapters: bool
) -> float:
    """FLOPs that the loss and its gradient ask for, by the lengths of prompts and of their completions.

    As model FLOPs utilization counts them (PaLM, arXiv 2204.02311, appendix B): of real tokens, not of
    padding; nothing that is computed again; of attention what the causal mask leaves. A prompt counts
    once for all its completions, since more is not asked for. With `adapters` the weights beside them
    have no gradient; the adapters' own FLOPs, some thousandths, are left out.
    """
    total = 0.0
    for prompt, group in zip(prompts, completions, strict=True):
        shared = counts.forward(model, Tree(1, prompt, 0, 0), 2, causal=True).flops
        total += shared
        for own in group:
            branch = counts.forward(model, Tree(1, prompt, 1, own), 2, causal=True).flops - shared
            total += branch + counts.head(model, own, 2).flops
    return (2 if adapters else 3) * total
