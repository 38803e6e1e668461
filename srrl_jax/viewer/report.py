"""The HTML report of a run: one self-contained file that a person opens after training."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.run_log import PHASES, plain
from srrl_jax.telemetry.text import duration
from srrl_jax.viewer.export import STATIC
from srrl_jax.viewer.index import Index
from srrl_jax.viewer.queries import criteria, options, overview

Curves = Mapping[str, Sequence[tuple[int, float]]]

MAX_FOLDED = 12
"""How many of a step's samples are shown folded, beside the best and the worst."""
CRITERIA, DISAGREEMENTS = 20, 10
"""How many criteria, of those to repair first, and samples, on which judges differ most, are shown."""
_DIFFER = f"""SELECT id FROM samples WHERE differ > 0
ORDER BY differ DESC, differ / len(criteria) DESC, id DESC LIMIT {DISAGREEMENTS}"""
_SCRIPTS = ("dom", "charts", "draw", "report")


def write_report(
    run_dir: str | Path,
    curves: Curves | None = None,
    table: Sequence[Mapping] | None = None,
    title: str | None = None,
) -> epath.Path:
    """Write ``run_dir/report.html`` from the run's config and logs, and return its path.

    ``curves`` are scores from outside the run's own grader, {label: [(step, value), ...]}, drawn
    with the self-given reward: where they part, the policy games its own grader. ``table`` is the
    headline, rows of {"what", "before", "after"}. Charts whose metrics were not logged are left
    out. Where `srrl view --export RUN_DIR/view` has written the samples, the report links there. Raises
    InputError when ``run_dir`` has no metrics.jsonl.

    The page holds its data as JSON, the viewer's style and the scripts with which the viewer draws, and
    a policy that lets no other script run and nothing be loaded.
    """
    run_dir = storage.locate(run_dir)
    if not storage.parts(run_dir / "metrics.jsonl"):
        raise InputError(f"{run_dir}: no metrics.jsonl there; give the directory of a run")
    config = run_dir / "config.yaml"
    with Index([run_dir], searched=False) as index:
        data = overview(index, {}) | {
            "title": title or f"Self-rewarding run: {run_dir.name}",
            "headline": list(table or []),
            "viewer": "view/index.html" if (run_dir / "view/index.html").is_file() else "",
            "config": config.read_text(encoding="utf-8") if config.is_file() else "",
            "criteria": criteria(index, {})["rows"][:CRITERIA],
            "judges": options(index, {})["judges"],
            "disagreements": [("", index.row(0, row["id"])) for row in index.ask(_DIFFER)],
            "splits": [
                {"name": name, "steps": steps}
                for split, name in (("train", "Training"), ("eval", "Held-out"))
                if (steps := _steps(index, split))
            ],
        }
    data["facts"] = _facts(data["recipe"], data["curves"])
    reward, *others = data["charts"]
    for label, curve in (curves or {}).items():
        reward = reward._replace(lines=reward.lines | {f"outside/{label}": label})
        known = [(step, value) for step, value in curve if value is not None and math.isfinite(value)]
        data["curves"][f"outside/{label}"] = known
    data["charts"] = [reward, *others]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # completions are text that nobody vetted; `tojson` hides what could end a script
        undefined=StrictUndefined,
    )
    environment.filters["hash"] = _hash
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    script = "\n".join((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    page = environment.get_template("report.html").render(
        data=plain(data), script=Markup(script), style=Markup(style)
    )
    path = run_dir / "report.html"
    # "replace": the title may hold half of a surrogate pair, which UTF-8 cannot.
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def _hash(text: str) -> str:
    """How a Content-Security-Policy names a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _facts(recipe: Mapping[str, str], curves: Curves) -> list[tuple[str, str]]:
    """(name, value) pairs of the header; what the recipe does not say is left out."""
    keys = {
        "Model": "model",
        "Training rows": "data.train",
        "Held-out rows": "data.eval",
        "Grader": "grader",
        "Group size": "group_size",
        "Seed": "seed",
    }
    facts = [(name, recipe[key]) for name, key in keys.items() if recipe.get(key, "None") != "None"]
    done = str(max((curve[-1][0] for curve in curves.values()), default=0))
    planned = recipe.get("steps", done)
    facts.append(("Steps", done if planned == done else f"{done} of {planned}"))
    seconds = sum(value for phase in PHASES for _, value in curves.get(f"time/{phase}", ()))
    return [*facts, ("Time", duration(seconds))] if seconds else facts


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
        "shown": [(label, index.row(0, id)) for id, label in shown.items()],
        "rest": [("", index.row(0, id)) for id in rest[:MAX_FOLDED]],
        "left_out": max(0, len(rest) - MAX_FOLDED),
    }
