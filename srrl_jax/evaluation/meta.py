"""How good a grader is: its verdicts against physicians' labels."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srrl_jax.errors import InputError
from srrl_jax.evaluation.agreement import Agreement, agreement, grader_pairs, mean, physician_pairs
from srrl_jax.evaluation.judge import check_items
from srrl_jax.evaluation.labels import LabelRow
from srrl_jax.evaluation.samples import append_lines, open_lines, write_results
from srrl_jax.grading import GradingItem, Judge
from srrl_jax.telemetry import read_jsonl


class MetaResult(NamedTuple):
    """A meta-evaluation.

    Attributes:
      pooled: all pairs of a verdict and a label; its `f1_balanced` is the headline.
      categories: the same, by category.
      negative: the same, of criteria with negative points alone.
      physicians: labels against the other labels of their rows, pooled.
      each_physician: the balanced F1 of each physician against the others.
      rows, unscorable: how many, and the share of verdicts that could not be read.
    """

    pooled: Agreement
    categories: dict[str, Agreement]
    negative: Agreement
    physicians: Agreement
    each_physician: dict[str, float | None]
    rows: int
    unscorable: float


def grade_labels(
    labels: Sequence[LabelRow],
    judge: Judge,
    out: str | Path,
    *,
    settings: dict[str, Any],
    chunk: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[bool | None]:
    """The judge's verdict on every row, in order.

    The criteria of one response are graded together, `chunk` responses at a time. Writes
    `out/samples.jsonl`, a line for each row, as it goes; what is there already is not done again.
    """
    path = Path(out) / "samples.jsonl"
    lines = open_lines(path, path.with_name("settings.json"), {"grader": judge.name} | settings)
    done: dict[int, bool | None] = {line["row"]: line["criteria_met"] for line in lines}
    responses = defaultdict(list)
    for index, row in enumerate(labels):
        if index not in done:
            responses[repr(row.prompt), row.response].append(index)
    groups = list(responses.values())
    items = [
        GradingItem(labels[g[0]].prompt, labels[g[0]].response, [labels[i].criterion for i in g])
        for g in groups
    ]
    check_items(judge, [(f"row {g[0] + 1}", item) for g, item in zip(groups, items, strict=True)])
    for start in range(0, len(groups), chunk):
        on_progress(len(done), len(labels))
        part = groups[start : start + chunk]
        lines = [
            {"row": index, "criteria_met": verdict.met, "explanation": verdict.explanation}
            for group, row in zip(part, judge.grade(items[start : start + chunk]), strict=True)
            for index, verdict in zip(group, row, strict=True)
        ]
        append_lines(path, lines)
        done |= {line["row"]: line["criteria_met"] for line in lines}
    on_progress(len(labels), len(labels))
    return [done[index] for index in range(len(labels))]


def ready_verdicts(path: str | Path, rows: int) -> list[bool | None]:
    """Verdicts from a file of lines {"criteria_met": true, false or null}, one for each row of labels.

    They stand in the order of the rows, or each names its own, from 0, as "row". Raises InputError
    for a line without a verdict, and when rows have none.
    """
    found: dict[int, bool | None] = {}
    for number, line in enumerate(read_jsonl(path)):
        met = line.get("criteria_met", "")
        if met is not None and not isinstance(met, bool):
            raise InputError(f'{path}: object {number + 1} needs "criteria_met": true, false or null')
        found[line.get("row", number)] = met
    if sorted(found) != list(range(rows)):
        raise InputError(
            f"{path} has verdicts for {len(found)} rows, but there are {rows}: give one for each"
        )
    return [found[row] for row in range(rows)]


def meta_evaluate(labels: Sequence[LabelRow], verdicts: Sequence[bool | None]) -> MetaResult:
    """Scores verdicts against labels; equal to simple-evals' where every verdict could be read."""

    def of(rows: Sequence[int]) -> Agreement:
        return agreement(grader_pairs([verdicts[i] for i in rows], [labels[i].labels for i in rows]))

    everything = range(len(labels))
    categories = defaultdict(list)
    for i in everything:
        if labels[i].category:
            categories[labels[i].category].append(i)
    known = [row for row in labels if row.physicians]
    physicians = physician_pairs([row.labels for row in known], [row.physicians for row in known])
    return MetaResult(
        pooled=of(everything),
        categories={name: of(rows) for name, rows in sorted(categories.items())},
        negative=of([i for i in everything if labels[i].criterion.points < 0]),
        physicians=agreement(pair for pairs in physicians.values() for pair in pairs),
        each_physician={name: agreement(pairs).f1_balanced for name, pairs in sorted(physicians.items())},
        rows=len(labels),
        unscorable=list(verdicts).count(None) / len(verdicts),
    )


def save(result: MetaResult, out: str | Path, settings: dict[str, Any]) -> None:
    """Writes `out/results.json`."""

    def plain(a: Agreement) -> dict[str, Any]:
        f1 = {"f1_met": a.f1_met, "f1_not_met": a.f1_not_met, "f1_balanced": a.f1_balanced}
        return f1 | a._asdict() | {"pairs": a.n}

    write_results(
        out,
        settings
        | {
            "pairwise_model_f1_balanced": result.pooled.f1_balanced,
            "mean_of_categories": mean(a.f1_balanced for a in result.categories.values()),
            "pooled": plain(result.pooled),
            "negative_criteria": plain(result.negative),
            "physicians": plain(result.physicians),
            "mean_of_physicians": mean(result.each_physician.values()),
            "each_physician": result.each_physician,
            "categories": {name: plain(a) for name, a in result.categories.items()},
            "rows": result.rows,
            "unscorable": result.unscorable,
        },
    )
