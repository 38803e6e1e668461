"""Where a run stands, from its directory alone: `srrl status`."""

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath
from rich.table import Table
from rich.text import Text

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.live import COLUMNS, DOING
from srrl_jax.telemetry.run_log import iter_jsonl
from srrl_jax.telemetry.text import duration, number

_TAIL = 20  # steps that say how long one takes, and events that are looked at
_SILENCE = 120.0  # seconds without a sign after which a run may be dead; or three steps, if that is more


def read_status(run_dir: str | Path, now: datetime | None = None) -> dict[str, Any]:
    """What a run does, how far it is, its latest metrics, warnings and checkpoints, in JSON's types.

    Whether it lives is told by the newest time that it wrote down, so clocks of the machines should agree.

    Raises:
      InputError: there is no run.
    """
    folder, now = storage.locate(run_dir), now or datetime.now(UTC)
    if not (folder / "config.yaml").exists():
        raise InputError(f"{run_dir}: no run is here (no config.yaml); give the run_dir of a recipe")
    config = storage.read_yaml(folder / "config.yaml")
    metrics, timings, events = (_tail(folder / f"{name}.jsonl") for name in ("metrics", "timings", "events"))
    path, trackers = folder / "progress.json", folder / "trackers.json"
    progress = _json(path) or None
    done, steps = (metrics[-1]["step"] if metrics else 0), config["steps"]
    totals = [
        sum(v for k, v in row.items() if k.startswith("time/") and k != "time/compile") for row in timings
    ]
    usual = statistics.median(totals) if totals else None
    latest: dict[str, float] = {}
    for row in metrics:
        latest |= row
    state, style = _state(done, steps, usual, progress, events, now)
    return {
        "run_dir": str(run_dir),
        "model": config["model"],
        "state": state,
        "style": style,
        "step": done,
        "steps": steps,
        "seconds_per_step": usual,
        "seconds_left": usual * (steps - done) if usual and done < steps else None,
        "latest": {key: value for key, value in latest.items() if key != "step"},
        "events": [event for event in events if event["event"] not in ("start", "resume")][-5:],
        "checkpoints": _checkpoints(folder),
        "trackers": _json(trackers),
    }


def status_table(found: dict[str, Any]) -> Table:
    """What `read_status` found, on one screen."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def line(name: str, text: str, style: str = "") -> None:
        table.add_row(name, Text(text, style=style))

    latest = found["latest"]
    line("run", f"{found['run_dir']} ({found['model']})")
    line("state", found["state"], found["style"])
    line("step", f"{found['step']} of {found['steps']} ({found['step'] / found['steps']:.0%})")
    if found["seconds_left"]:
        each, left = duration(found["seconds_per_step"]), duration(found["seconds_left"])
        line("time", f"{each} a step, so about {left} left")
    values = [f"{label} {number(latest[key])}" for key, label in COLUMNS.items() if key in latest]
    line("latest", "  ".join(values) or "–")
    for event in found["events"]:
        line(event["event"], f"step {event['step']}: {event['message']}", "yellow")
    line("checkpoints", ", ".join(map(str, found["checkpoints"])) or "none yet")
    if found["trackers"]:
        line("trackers", ", ".join(f"{name} {each['id']}" for name, each in found["trackers"].items()))
    return table


def _state(
    done: int, steps: int, usual: float | None, progress: dict | None, events: list[dict], now: datetime
) -> tuple[str, str]:
    """What a run does and since when it has not been heard of, with a style."""
    last = events[-1] if events else None
    times = [datetime.fromisoformat(each["time"]) for each in (progress, last) if each]
    if not times:
        return "made, not begun", ""
    age = max((now - max(times)).total_seconds(), 0.0)
    ago = f"last sign {duration(age)} ago"
    if done >= steps:
        return f"finished, {ago}", "green"
    ended = ("preempted", "interrupted", "failed")
    if last and last["event"] in ended and last["time"] >= max(times).isoformat():
        return f"{last['event']}, {ago}; run the same command to go on", "red"
    doing = "starting"
    if progress:
        doing = f"{DOING.get(progress['phase'], progress['phase'])} {progress['note']}".strip()
    if age > max(_SILENCE, 3 * (usual or 0)):
        return f"silent while {doing}, {ago}: dead, or in one long computation", "red"
    return f"running: {doing}, {ago}", "green"


def _tail(log: epath.Path) -> list[dict]:
    parts = storage.parts(log)[-_TAIL:]  # in a store each is a step
    return [row for part in parts for row in iter_jsonl(part)][-_TAIL:]


def _json(path: epath.Path) -> dict[str, Any]:
    """What a run keeps in a file of JSON; {} where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete it") from None


def _checkpoints(folder: epath.Path) -> list[int]:
    path = folder / "checkpoints"
    names = [each.name for each in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())
