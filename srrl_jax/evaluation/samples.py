"""A file of graded samples that grows a line at a time, so that what was killed goes on where it stood."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl


def open_samples(directory: str | Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that `directory/samples.jsonl` holds already; makes the directory if there is none.

    `settings` decide the samples and are kept in `settings.json`. Raises InputError when the
    directory holds samples made with other settings.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path, kept = directory / "samples.jsonl", directory / "settings.json"
    if path.exists() and kept.exists():
        old = json.loads(kept.read_text(encoding="utf-8"))
        differ = [key for key in settings if old.get(key) != settings[key]]
        if differ:
            raise InputError(
                f"{directory} holds samples made with other settings ({', '.join(differ)}): "
                "give a new --out, or the same settings to go on"
            )
    kept.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    lines = read_jsonl(path) if path.exists() else []
    temporary = path.with_suffix(".tmp")  # without a last line that was cut short
    temporary.write_bytes(b"".join(map(_encode, lines)))
    os.replace(temporary, path)
    return lines


def append_samples(directory: str | Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes lines at the end of `directory/samples.jsonl`."""
    with (Path(directory) / "samples.jsonl").open("ab") as file:
        file.writelines(map(_encode, lines))


def write_results(directory: str | Path, results: dict[str, Any]) -> None:
    """Writes `directory/results.json`; makes the directory if there is none."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (Path(directory) / "results.json").write_text(text + "\n", encoding="utf-8")


def _encode(line: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which a model may write, becomes its backslash form.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
