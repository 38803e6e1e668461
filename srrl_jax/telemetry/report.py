"""The HTML report of a run: one self-contained file that a person opens after training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.charts import SERIES, Panel, Series, line_chart, stacked_chart
from srrl_jax.telemetry.curves import CHARTS, TILES
from srrl_jax.telemetry.run_log import PHASES, read_metrics
from srrl_jax.telemetry.text import duration, number, points
from srrl_jax.viewer.index import JUDGES, Index
from srrl_jax.viewer.queries import axis_curves, criteria

Curves = Mapping[str, Sequence[tuple[int, float]]]

MAX_FOLDED = 12
"""How many of a step's samples are shown folded, beside the best and the worst."""
CRITERIA, DISAGREEMENTS = 20, 10
"""How many criteria, of those to repair first, and samples, on which judges differ most, are shown."""
_DIFFER = f"""SELECT id FROM samples WHERE differ > 0
ORDER BY differ DESC, differ / len(criteria) DESC, id DESC LIMIT {DISAGREEMENTS}"""


@dataclass(frozen=True)
class Drawing:
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
    out. Where `srrl view --export RUN_DIR/view` has written the samples, the report links there. Raises
    InputError when ``run_dir`` has no metrics.jsonl.
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
    environment.globals["others"] = JUDGES[1:]
    with Index([run_dir], searched=False) as index:
        found = {
            "warnings": list(
                dict.fromkeys(
                    (e["step"], e["message"]) for e in index.runs[0].events() if e["event"] == "warning"
                )
            ),
            "axes": axis_curves(index, 0),
            "criteria": criteria(index, {})["rows"][:CRITERIA],
            "splits": [
                {"name": name, "steps": steps}
                for split, name in (("train", "Training"), ("eval", "Held-out"))
                if (steps := _steps(index, split))
            ],
            "disagreements": [_card("", index.row(0, row["id"])) for row in index.ask(_DIFFER)],
        }
    page = environment.get_template("report.html").render(
        title=title or f"Self-rewarding run: {run_dir.name}",
        facts=_facts(storage.read_yaml(config_path) if config else {}, metrics),
        table=[_headline(row) for row in table or []],
        tiles=_tiles(metrics),
        charts=_charts(metrics, found.pop("axes"), curves or {}),
        viewer="view/index.html" if (run_dir / "view/index.html").is_file() else "",
        config=config,
        **found,
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
    tiles = []
    for key, label in TILES.items():
        for series in _series(metrics, key, label):
            values = [value for _, value in series.points]
            tenth = max(1, len(values) // 10)
            first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            tiles.append({"label": label, "last": last, "first": first})
    return tiles


def _charts(metrics: list[dict], axes: Curves, curves: Curves) -> list[Drawing]:
    """Those of the table whose metrics were logged, the axes' scores and the seconds of each phase."""
    charts = []
    for title, note, panels in CHARTS:
        drawn, colour = [], 0
        for heading, fraction, lines in panels:
            series = []
            for key, label in lines.items():
                series += _series(metrics, key, label, colour)
                colour += 1
            drawn.append(Panel(heading, series, fraction))
        if title == "Reward":
            drawn[0].series.extend(_lines(curves, len(drawn[0].series)))
        charts += _line_chart(title, note, drawn, wide=title == "Reward")
    note = "Points met over positive points of each axis of the rubrics, in training's answers."
    axis_lines = _lines({name.removeprefix("axis/"): curve for name, curve in axes.items()}, 0)
    charts += _line_chart("Score by axis", note, [Panel("score", axis_lines)], wide=True)
    times = [
        line
        for colour, phase in enumerate(PHASES)
        for line in _series(metrics, f"time/{phase}", phase.capitalize(), colour % len(SERIES))
    ]
    if times:
        svg, remark = stacked_chart(times, 1060, 260)
        note = f"Seconds of each phase, stacked. {remark}".strip()
        charts.append(Drawing("Time", note, times, Markup(svg), wide=True))
    return charts


def _lines(curves: Curves, first: int) -> list[Series]:
    """Curves that have a finite value, in colours from `first` on."""
    known = {
        label: [(step, value) for step, value in curve if value is not None and math.isfinite(value)]
        for label, curve in curves.items()
    }
    drawn = [(label, curve) for label, curve in known.items() if curve]
    return [Series(label, curve, (first + i) % len(SERIES)) for i, (label, curve) in enumerate(drawn)]


def _line_chart(title: str, note: str, panels: list[Panel], wide: bool = False) -> list[Drawing]:
    """A list of one chart, or of none where no panel has a series."""
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return []
    width, height = (1060, 360) if wide else (520, 340)
    svg = Markup(line_chart(panels, width, height))  # our own drawing, no text of the run in it
    return [Drawing(title, note, [line for panel in panels for line in panel.series], svg, wide)]


def _steps(index: Index, split: str) -> list[dict]:
    """The samples of a split's first and last step: the best and the worst, and some of the others."""
    steps = index.ask("SELECT DISTINCT step FROM samples WHERE split = ? ORDER BY step", [split])
    ends = zip(("First", "Last"), steps[:1] + steps[1:][-1:], strict=False)
    return [_step(index, split, f"{end} step ({row['step']})", row["step"]) for end, row in ends]


def _step(index: Index, split: str, heading: str, step: int) -> dict:
    order = "ORDER BY reward DESC NULLS LAST, id"
    rows = index.ask(f"SELECT id, reward FROM samples WHERE split = ? AND step = ? {order}", [split, step])
    graded = [row["id"] for row in rows if row["reward"] is not None]
    shown = dict(zip(graded[:1] + graded[1:][-1:], ("Best", "Worst"), strict=False))
    rest = [row["id"] for row in rows if row["id"] not in shown]
    return {
        "heading": heading,
        "cards": [_card(label, index.row(0, id)) for id, label in shown.items()],
        "rest": [_card("", index.row(0, id)) for id in rest[:MAX_FOLDED]],
        "left_out": max(0, len(rest) - MAX_FOLDED),
    }


def _card(label: str, row: dict) -> dict:
    """What the template shows of a sample, beside its row."""
    known = [(c["points"], c["verdict"]) for c in row["criteria"] if c["verdict"] is not None]
    return row | {
        "label": label,
        "completion": row["completion"] if row["completion"] != row["response"] else "",
        "won": sum(points for points, met in known if met and points > 0),
        "lost": sum(points for points, met in known if met and points < 0),
        "possible": sum(points for points, met in known if points > 0),
    }
