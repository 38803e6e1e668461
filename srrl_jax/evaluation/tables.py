"""How results are shown: a model's scores, the published ones beside them, a grader's agreement."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from srrl_jax.evaluation.agreement import Agreement, mean
from srrl_jax.evaluation.evaluate import Result
from srrl_jax.evaluation.meta import MetaResult
from srrl_jax.evaluation.scores import ADJUSTED, LENGTH_CENTER, LENGTH_PENALTY, OVERALL
from srrl_jax.rubrics import SIMPLE_EVALS_SHA256

# HealthBench Hard, 1,000 rows: arXiv 2509.25534; o3 and GPT-5 as quoted there.
PUBLISHED = (
    ("GPT-5", 0.462, "GPT-4.1"),
    ("o3", 0.32, "GPT-4.1"),
    ("Qwen3-32B", 0.147, "GPT-4.1"),
    ("Qwen3-32B + RL, baseline grader", 0.446, "GPT-4.1"),
    ("Qwen3-32B + self-rewarding, grading temperature 0.6", 0.486, "GPT-4.1"),
    ("Qwen3-32B + self-rewarding, grading temperature 1.0", 0.500, "GPT-4.1"),
    ("Qwen3-8B", 0.108, "GPT-4.1"),
    ("Qwen3-8B + self-rewarding", 0.363, "GPT-4.1"),
)
# What simple-evals calls pairwise_model_f1_balanced is pooled; OpenAI's paper averages over criteria.
PUBLISHED_GRADERS = (("GPT-4.1, OpenAI's paper", 0.71), ("physicians, OpenAI's paper", 0.647))

# Of HealthBench, and of HealthBench Professional the last four.
_KINDS = (OVERALL, "theme:", "axis:", "level:", "use_case:", "type:", "difficulty:", "specialty:")


def template_label(settings: Mapping[str, Any]) -> str:
    """The name of the template that a judge's `settings` hold, and whether it is simple-evals' own."""
    own = settings["template_sha256"] == SIMPLE_EVALS_SHA256
    return f"{settings['template']} (simple-evals' own words)" if own else settings["template"]


def score_table(result: Result, grader: str, template: str, length_penalty: float = LENGTH_PENALTY) -> Table:
    """Overall, per theme, per axis and per level: mean, bootstrap standard error, responses."""
    title = f"Score by {grader}, template {template}"
    table = _table("", "score", "± s.e.", "n", title=title)
    for kind in _KINDS:
        for name in sorted(name for name in result.scores if name.startswith(kind)):
            score = result.scores[name]
            table.add_row(name, f"{score.mean:.3f}", f"{score.std_error:.3f}", str(score.n))
        table.add_section()
    table.caption = f"{ADJUSTED}: less {length_penalty:g} per 500 characters beyond {LENGTH_CENTER}"
    return table


def published_table(result: Result, model: str, grader: str, rows: str) -> Table:
    """The overall score among the published ones, best first, each with who graded it on what."""
    table = _table("model", "rows", "grader", "score", title="Beside published scores")
    entries = [(name, "HealthBench Hard", by, score, "") for name, score, by in PUBLISHED]
    if OVERALL in result.scores:
        entries.append((model, f"{rows} ({result.responses})", grader, result.scores[OVERALL].mean, "bold"))
    for name, what, by, score, style in sorted(entries, key=lambda entry: -entry[3]):
        table.add_row(name, what, by, f"{score:.3f}", style=style)
    table.caption = "Scores of different rows, graders or templates do not compare."
    return table


def agreement_table(result: MetaResult, grader: str, template: str | None) -> Table:
    """The grader against physicians: pooled, per category, negative criteria apart, baselines."""
    title = f"Agreement with labels: {grader}" + (f", template {template}" if template else "")
    table = _table("", "F1 met", "F1 not met", "balanced", "pairs", title=title)
    table.add_row("pooled", *_figures(result.pooled), style="bold")
    table.add_row("negative criteria", *_figures(result.negative))
    table.add_section()
    for name, part in result.categories.items():
        table.add_row(name, *_figures(part))
    if result.categories:
        balanced = mean(part.f1_balanced for part in result.categories.values())
        table.add_row("mean of categories", "", "", _number(balanced), "")
    table.add_section()
    table.add_row("physicians, pooled", *_figures(result.physicians))
    table.add_row("mean of physicians", "", "", _number(mean(result.each_physician.values())), "")
    for name, balanced in PUBLISHED_GRADERS:
        table.add_row(name, "", "", _number(balanced), "")
    return table


def confusion_table(result: MetaResult) -> Table:
    """What was said against what physicians said; criteria with negative points apart."""
    table = _table("", "both met", "only grader", "only label", "neither", title="Confusion")
    table.add_row("all criteria", *map(str, result.pooled))
    table.add_row("negative criteria", *map(str, result.negative))
    return table


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title)
    for column in columns:
        words = column in ("", "model", "rows", "grader")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _figures(part: Agreement) -> list[str]:
    return [*map(_number, (part.f1_met, part.f1_not_met, part.f1_balanced)), str(part.n)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
