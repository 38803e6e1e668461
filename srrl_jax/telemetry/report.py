"""The HTML report of a run: one self-contained file that a person opens after training."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.charts import Panel, Series, line_chart, stacked_chart
from srrl_jax.telemetry.run_log import PHASES, iter_jsonl, read_metrics
from srrl_jax.telemetry.text import duration, number, points

Curves = Mapping[str, Sequence[tuple[int, float]]]

MAX_FOLDED = 12
"""How many of a step's samples are shown folded, beside the best and the worst."""


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    legend: list[Series]
    svg: Markup
    wide: bool = False

    @property
    def description(self) -> str:
        """What a screen reader says in place of the picture."""
        lines = [
            f"{line.label}: {number(line.points[0][1])} at step {line.points[0][0]}, "
            f"{number(line.last)} at step {line.points[-1][0]}"
            for line in self.legend
        ]
        return f"{self.title}. {'; '.join(lines)}."


def write_report(
    run_dir: str | Path,
    curves: Curves | None = None,
    table: Sequence[Mapping] | None = None,
    title: str | None = None,
) -> epath.Path:
    """Render ``run_dir/report.html`` from the run's config and logs, and return its path.

    ``curves`` are scores from outside the run's own grader, {label: [(step, value), ...]}, drawn
    with the self-given reward: where they part, the policy games its own grader. ``table`` is the
    headline, rows of {"what", "before", "after"}. Charts whose metrics were not logged are left
    out. Raises InputError when ``run_dir`` has no metrics.jsonl.
    """
    run_dir = storage.locate(run_dir)
    if not storage.parts(run_dir / "metrics.jsonl"):
        raise InputError(f"{run_dir}: no metrics.jsonl there; give the directory of a run")
    metrics = read_metrics(run_dir)
    config_path = run_dir / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # completions are text that nobody vetted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "points": points}
    page = environment.get_template("report.html").render(
        title=title or f"Self-rewarding run: {run_dir.name}",
        facts=_facts(yaml.safe_load(config) or {}, metrics),
        table=[_headline(row) for row in table or []],
        warnings=_warnings(run_dir / "events.jsonl"),
        tiles=_tiles(metrics),
        charts=_charts(metrics, curves or {}),
        splits=_splits(run_dir / "samples.jsonl"),
        config=config,
    )
    path = run_dir / "report.html"
    # "replace": a completion may hold half of a surrogate pair, which UTF-8 cannot.
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def _facts(config: dict, metrics: list[dict]) -> list[tuple[str, str]]:
    """(name, value) pairs of the header; what the config does not say is left out."""
    keys = {
        "Model": "model",
        "Training rows": "data.train",
        "Held-out rows": "data.eval",
        "Grader": "grader",
        "Group size": "group_size",
        "Seed": "seed",
    }
    facts = [(name, _lookup(config, key)) for name, key in keys.items()]
    facts = [(name, str(value)) for name, value in facts if value is not None]
    planned = config.get("steps")
    done = metrics[-1]["step"] if metrics else 0
    facts.append(("Steps", f"{done} of {planned}" if planned not in (None, done) else str(done)))
    seconds = sum(row.get(f"time/{phase}") or 0 for row in metrics for phase in PHASES)
    if seconds:
        facts.append(("Time", duration(seconds)))
    return facts


def _warnings(path: epath.Path) -> list[tuple[int, str]]:
    """(step, message) of every warning, once though a resumed run gave it again."""
    rows = iter_jsonl(path) if storage.parts(path) else ()
    return list(dict.fromkeys((row["step"], row["message"]) for row in rows if row["event"] == "warning"))


def _lookup(config: dict, dotted: str) -> object:
    value = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _headline(row: Mapping) -> dict:
    before, after = row.get("before"), row.get("after")
    both = all(isinstance(value, int | float) for value in (before, after))
    change = after - before if both else None
    return {"what": row["what"], "before": before, "after": after, "change": _signed(change)}


def _signed(value: float | None) -> str:
    return "" if value is None else ("+" if value > 0 else "") + number(value)


def _series(metrics: list[dict], key: str, label: str, colour: int = 0) -> list[Series]:
    """The metric as a list of one series, or of none where it was never logged."""
    logged = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    return [Series(label, logged, colour)] if logged else []


def _tiles(metrics: list[dict]) -> list[dict]:
    """Key numbers: the mean over the last tenth of the run, and over the first for comparison."""
    keys = {
        "Self-given reward": "reward/mean",
        "Held-out, self-graded": "eval/self",
        "KL to the reference": "kl",
        "Entropy": "entropy",
        "Completion length": "completions/mean_length",
        "Unscorable verdicts": "grader/unscorable",
        "Tokens per second": "perf/tokens_per_s",
        "Verdicts per second": "perf/verdicts_per_s",
        "Update, of the chips' peak": "perf/mfu",
    }
    tiles = []
    for label, key in keys.items():
        for series in _series(metrics, key, label):
            values = [value for _, value in series.points]
            tenth = max(1, len(values) // 10)
            first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            tiles.append({"label": label, "last": last, "first": first})
    return tiles


def _charts(metrics: list[dict], curves: Curves) -> list[Chart]:
    def find(*wanted: tuple[str, str]) -> list[Series]:
        # The place in the call sets the colour; ("", "") leaves one to another panel's line.
        return [
            line
            for colour, (key, label) in enumerate(wanted)
            for line in _series(metrics, key, label, colour)
        ]

    outside = [
        Series(label, [(step, v) for step, v in curve if v is not None and math.isfinite(v)], 0)
        for label, curve in curves.items()
    ]
    rewards = find(
        ("reward/mean", "Self-given reward"),
        ("eval/self", "Held-out, self-graded"),
        ("eval/frozen", "Held-out, graded by the frozen start"),
        ("eval/teacher", "Held-out, graded by the teacher"),
    )
    rewards += [line for line in outside if line.points]
    rewards = [Series(line.label, line.points, i % 6) for i, line in enumerate(rewards)]
    note = "Mean over the step's responses."
    if len(rewards) > 2:
        note = (
            "A self-given reward that climbs while an outside score does not is reward hacking:"
            " the policy learns to please its own grader."
        )
    charts = _lines("Reward", note, [Panel("score", rewards)], wide=True)
    charts += _lines(
        "Distance and diversity",
        "How far the policy has moved from its reference, and how varied its sampling still is.",
        [
            Panel("KL (nats a token)", find(("kl", "KL to the reference"))),
            Panel("entropy (nats a token)", find(("", ""), ("entropy", "Entropy"))),
        ],
    )
    charts += _lines(
        "Completions",
        "Truncated ones reached the length limit without ending.",
        [
            Panel("tokens", find(("completions/mean_length", "Mean length"))),
            Panel(
                "fraction truncated",
                find(("", ""), ("completions/truncated", "Truncated")),
                fraction=True,
            ),
        ],
    )
    charts += _lines(
        "Grader",
        "Fraction of criteria judged met. Unscorable verdicts could not be read and count neither way.",
        [
            Panel(
                "fraction",
                find(
                    ("grader/met_rate", "Met, all criteria"),
                    ("grader/met_rate_negative", "Met, negative criteria"),
                    ("grader/unscorable", "Unscorable"),
                    ("grader/agreement_frozen", "Agreement with the frozen grader"),
                    ("grader/agreement_teacher", "Agreement with the teacher"),
                ),
                fraction=True,
            )
        ],
    )
    charts += _lines(
        "Updates",
        "Size of the gradient, and the fraction of tokens where the policy ratio was clipped.",
        [
            Panel("gradient norm", find(("grad_norm", "Gradient norm"))),
            Panel(
                "fraction clipped",
                find(
                    ("", ""),
                    ("clip_frac/low", "Clipped low"),
                    ("clip_frac/high", "Clipped high"),
                ),
                fraction=True,
            ),
        ],
    )
    times = find(*((f"time/{phase}", phase.capitalize()) for phase in PHASES))
    if times:
        svg, remark = stacked_chart(times, 1060, 260)
        note = f"Seconds of each phase, stacked. {remark}".strip()
        charts.append(Chart("Time", note, times, Markup(svg), wide=True))
    return charts


def _lines(title: str, note: str, panels: list[Panel], wide: bool = False) -> list[Chart]:
    """A list of one chart, or of none where no panel has a series."""
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return []
    width, height = (1060, 360) if wide else (520, 340)
    svg = Markup(line_chart(panels, width, height))  # our own drawing, no text of the run in it
    return [Chart(title, note, [line for panel in panels for line in panel.series], svg, wide)]


def _splits(path: epath.Path) -> list[dict]:
    """For each split, the samples of its first and its last step, as the template shows them."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in iter_jsonl(path) if storage.parts(path) else ():  # may be larger than memory
        ends = found.setdefault(row["split"], {"first": [row], "last": []})
        if row["step"] == ends["first"][0]["step"]:
            if row is not ends["first"][0]:
                ends["first"].append(row)
        elif ends["last"] and row["step"] == ends["last"][0]["step"]:
            ends["last"].append(row)
        else:
            ends["last"] = [row]
    return [
        {
            "name": name,
            "steps": [_step_view(end, rows) for end, rows in found[split].items() if rows],
        }
        for split, name in (("train", "Training"), ("eval", "Held-out"))
        if split in found
    ]


def _step_view(end: str, rows: list[dict]) -> dict:
    graded = [row for row in rows if row.get("reward") is not None]
    ranked = sorted(graded, key=lambda row: row["reward"], reverse=True)
    shown = [("Best", ranked[0])] if ranked else []
    shown += [("Worst", ranked[-1])] if len(ranked) > 1 else []
    rest = ranked[1:-1] + [row for row in rows if row.get("reward") is None]
    return {
        "heading": f"{end.capitalize()} step ({rows[0]['step']})",
        "cards": [_card(label, row) for label, row in shown],
        "rest": [_card("", row) for row in rest[:MAX_FOLDED]],
        "left_out": max(0, len(rest) - MAX_FOLDED),
    }


def _card(label: str, row: dict) -> dict:
    criteria = row["criteria"]
    return {
        "label": label,
        "reward": row.get("reward"),
        "advantage": row.get("advantage"),
        "tokens": row.get("tokens"),
        "truncated": bool(row.get("truncated")),
        "prompt_id": row.get("prompt_id", ""),
        "prompt": row["prompt"],
        "response": row["response"],
        "completion": row["completion"] if row["completion"] != row["response"] else "",
        "criteria": criteria,
        "won": _total(criteria, lambda c: c["verdict"] and c["points"] > 0),
        "lost": _total(criteria, lambda c: c["verdict"] and c["points"] < 0),
        "possible": _total(criteria, lambda c: c["verdict"] is not None and c["points"] > 0),
    }


def _total(criteria: Iterable[dict], counts: Callable[[dict], bool]) -> float:
    return sum(criterion["points"] for criterion in criteria if counts(criterion))
