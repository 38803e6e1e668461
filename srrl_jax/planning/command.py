"""`srrl plan`."""

import json

import jax
from rich.console import Console

from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import Assumptions, make_plan
from srrl_jax.planning.table import render
from srrl_jax.training import TrainConfig


def run_plan(
    recipe: str,
    overrides: list[str],
    topology: Topology,
    *,
    as_json: bool,
    completion: float | None,
    verdict: float | None,
    **others: float,
) -> bool:
    """Prints the plan of a recipe; whether it fits. See `Assumptions` for the means.

    Raises:
      InputError: in recipe, overrides or topology.
    """
    jax.config.update("jax_platforms", "cpu")  # planning takes no accelerator, even where there is one
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read back what it has not run
    config = TrainConfig.load(recipe, overrides)
    assumptions = Assumptions(
        completion or config.rollout.max_new_tokens / 2,
        verdict or config.grading.max_new_tokens / 2,
        **others,
    )
    progress = Console(stderr=True)
    with progress.status("planning") as status:
        show = status.update if progress.is_terminal else progress.print
        plan = make_plan(config, topology, assumptions, lambda name: show(f"compiling {name}"))
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        Console().print(render(plan))
    return plan.fits
