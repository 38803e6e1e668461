"""The two append-only logs of a run directory: metrics.jsonl and samples.jsonl."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError

PHASES = ("rollout", "grade", "logprob", "update", "eval", "checkpoint")
"""The parts of a step, in order; ``time/<phase>`` holds the seconds each one took."""


class RunLog:
    """Writes the logs of one run, and takes them back to a checkpoint when it resumes.

    Only one process may write to a run directory (process 0 of a multi-process run).
    """

    def __init__(self, run_dir: str | Path):
        folder = storage.locate(run_dir)
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, metrics: dict, samples: Iterable[dict] = ()) -> None:
        """Append the metrics line of ``step`` and its samples; on return the system has both.

        Values may be Python, NumPy or JAX scalars; NaN and infinities are written as null. Nothing
        is added but the step, so two runs of one config and seed differ only in the times.
        """
        # Samples first: a step whose metrics line exists has all its samples.
        storage.append(self.samples_path, b"".join(_line(step, sample) for sample in samples))
        storage.append(self.metrics_path, _line(step, metrics))

    def rewind(self, step: int) -> None:
        """Drop every line later than the checkpoint's ``step``, and a torn last line.

        The resumed run then writes those steps again: none is there twice, none is missing. Each
        file is replaced in one move, so being killed here is harmless too.
        """
        for path in (self.metrics_path, self.samples_path):
            for part in reversed(storage.parts(path)):
                if storage.is_remote(part):  # an append, so of one step
                    if next(iter_jsonl(part))["step"] <= step:
                        break
                    part.unlink()
                else:
                    storage.replace(part, (_encode(row) for row in iter_jsonl(part) if row["step"] <= step))


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


def _line(step: int, row: dict) -> bytes:
    rest = {key: value for key, value in row.items() if key != "step"}
    return _encode({"step": int(step)} | rest)


def _encode(row: dict) -> bytes:
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
    # A grader may write half of a surrogate pair; its backslash form is what JSON asks for.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def _plain(value: object) -> object:
    """``value`` in JSON's types: array scalars unwrapped, non-finite numbers to None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        return _plain(value.item())
    return value
