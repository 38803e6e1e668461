"""A plan as text."""

from rich.console import Group
from rich.table import Table

from srrl_jax.parallel.chips import GIB
from srrl_jax.planning.plan import Phase, Plan

# What makes the programs of a group smaller.
_HELP = {
    "rollout": "rollout.memory_gb, rollout.max_new_tokens, rollout.max_prompt_tokens; a larger mesh.tensor",
    "grade": "grading.memory_gb, grading.max_new_tokens, rollout.max_new_tokens; grading.thinking=false; "
    "a larger mesh.tensor",
    "logprob": "optimizer.microbatch, rollout.max_new_tokens, rollout.max_prompt_tokens; "
    "a larger mesh.tensor",
    "update": "optimizer.microbatch, rollout.max_new_tokens, rollout.max_prompt_tokens; "
    "optimizer.remat=full, optimizer.first_moment=bfloat16, dtype=bfloat16, "
    "reference=host; a larger "
    "mesh.tensor or mesh.fsdp",
}


def render(plan: Plan) -> Group:
    """The table of phases, then a step, the run and what was assumed."""
    chip = plan.topology.chip
    table = Table(
        title=f"{plan.topology}, {plan.topology.size} devices of {chip.hbm / GIB:.2f} GiB",
        caption="of one device and one run; HBM in GiB at its peak",
    )
    table.add_column("phase", no_wrap=True)
    table.add_column("rows x (prefix + branches x own)")
    for name in ("HBM", "TFLOP", "GB moved", "GB sent", "seconds", "runs a step"):
        table.add_column(name, justify="right")
    for p in plan.phases:
        peak = "refused" if p.peak_hbm_bytes is None else f"{p.peak_hbm_bytes / GIB:.2f}"
        sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in p.collective_bytes.items()) or "0"
        if p.network_bytes:
            sent += f"; {p.network_bytes / 1e9:.3g} over the network"
        table.add_row(
            p.name, p.sizes, peak if p.fits else f"[red]{peak}", f"{p.flops / 1e12:.3g}",
            f"{p.traffic_bytes / 1e9:.3g}", sent, f"{p.predicted_s:.3g}", f"{p.runs:.3g}",
        )  # fmt: skip
    return Group(table, *_summary(plan))


def _summary(plan: Plan) -> list[str]:
    a = plan.assumptions
    lines = [
        f"step {plan.step_s:.0f} s; run of {plan.steps} steps {plan.run_hours:.1f} h, "
        f"{plan.run_hours * plan.topology.chips:.0f} chip-hours, at published peaks, which nothing reaches",
        f"assumed: completions of {a.completion:g} tokens, {a.criteria:g} criteria with replies of "
        f"{a.verdict:g} tokens, {a.tries:g} tries each; prompts of up to {a.longest_prompt} tokens, up to "
        f"{a.most_criteria} criteria of up to {a.longest_criterion}; updates at their largest size; no "
        "evaluation, checkpoints or host time",
    ]
    if plan.fits:
        return [*lines, f"fits: {plan.free:.0%} of the HBM is free in {plan.tightest.name}"]
    return [*lines, *(_why_not(p) for p in plan.phases if not p.fits)]


def _why_not(p: Phase) -> str:
    need = p.refusal.partition("\n")[0] or f"needs {p.peak_hbm_bytes / GIB:.2f} GiB"
    largest = f"largest array {p.largest_array}; " if p.largest_array else ""
    return f"{p.name} does not fit: {need}; {largest}make smaller: {_HELP[p.name.split('/')[0]]}"
