"""The append-only logs of a run directory: metrics, samples, timings and events, as JSON lines."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError

PHASES = ("relayout", "rollout", "grade", "logprob", "update", "eval", "checkpoint")
"""The parts of a step, in order; ``time/<phase>`` holds the seconds each one took."""


class RunLog:
    """Writes the logs of one run, and takes them back to a checkpoint when it resumes.

    What a step computed and how long it took are kept apart: two runs of one config and seed have
    metrics.jsonl and samples.jsonl alike to the bit, however often they were killed. timings.jsonl
    holds seconds and rates; events.jsonl tells when the run began, resumed, warned and ended.

    Only one process may write to a run directory (process 0 of a multi-process run).
    """

    def __init__(self, run_dir: str | Path):
        folder = storage.locate(run_dir)
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.timings_path = folder / "timings.jsonl"
        self.events_path = folder / "events.jsonl"
        self.progress_path = folder / "progress.json"
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        step: int,
        metrics: Mapping[str, object],
        samples: Iterable[dict] = (),
        timings: Mapping[str, float] | None = None,
    ) -> None:
        """Append the metrics line of ``step``, its samples and its timings; on return the disk has them.

        Values may be Python, NumPy or JAX scalars; NaN and infinities are written as null.
        """
        # The metrics line last: a step that has one has everything.
        storage.append(self.samples_path, b"".join(_line(step, sample) for sample in samples))
        if timings is not None:
            storage.append(self.timings_path, _line(step, timings))
        storage.append(self.metrics_path, _line(step, metrics))

    def event(self, step: int, kind: str, message: str) -> None:
        """Append to events.jsonl, with the time; never taken back."""
        line = _line(step, {"time": _now(), "event": kind, "message": message})
        storage.append(self.events_path, line)

    def progress(self, step: int, phase: str, note: str) -> None:
        """Replace progress.json: what is being done after ``step`` steps, how far it is, and the time."""
        row = {"step": step, "time": _now(), "phase": phase, "note": note}
        storage.replace(self.progress_path, [_encode(row)])

    def rewind(self, step: int) -> None:
        """Drop every line later than the checkpoint's ``step``, and a torn last line (events: only that).

        The resumed run then writes those steps again: none is there twice, none is missing. Each
        file is replaced in one move, so being killed here is harmless too.
        """
        limits = dict.fromkeys((self.metrics_path, self.samples_path, self.timings_path), step)
        for path, last in {**limits, self.events_path: math.inf}.items():
            for part in reversed(storage.parts(path)):
                if storage.is_remote(part):  # an append, so of one step
                    if next(iter_jsonl(part))["step"] <= last:
                        break
                    part.unlink()
                else:
                    rows = (row for row in iter_jsonl(part) if row["step"] <= last)
                    storage.replace(part, map(_encode, rows))


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, each with the timings of its step where there are any."""
    folder = storage.locate(run_dir)
    metrics, path = read_jsonl(folder / "metrics.jsonl"), folder / "timings.jsonl"
    timings = {row["step"]: row for row in iter_jsonl(path)} if storage.parts(path) else {}
    return [row | timings.get(row["step"], {}) for row in metrics]


def iter_jsonl(path: str | Path) -> Iterator[dict]:
    """The objects of a JSON Lines file, one at a time.

    A last line that was cut short (the writer was killed) is left out. Raises InputError, naming
    file and line, for anything else that is not a JSON object, and if there is no such file.
    """
    parts = storage.parts(path)
    if not parts:
        raise InputError(f"{path}: no such file; give the path of a run's log")
    for part in parts:
        yield from _rows(part)


def _rows(path: epath.Path) -> Iterator[dict]:
    with path.open("rb") as file:  # bytes: only \n ends a line, and a cut may split a character
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"{path}:{number}: not JSON ({error}); delete the line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object; delete the line")
            yield row


def read_jsonl(path: str | Path) -> list[dict]:
    """All objects of a JSON Lines file; see `iter_jsonl`."""
    return list(iter_jsonl(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(step: int, row: Mapping) -> bytes:
    rest = {key: value for key, value in row.items() if key != "step"}
    return _encode({"step": int(step)} | rest)


def _encode(row: dict) -> bytes:
    text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
    # A grader may write half of a surrogate pair; its backslash form is what JSON asks for.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def plain(value: object) -> object:
    """``value`` in JSON's types: array scalars unwrapped, non-finite numbers to None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        return plain(value.item())
    return value
