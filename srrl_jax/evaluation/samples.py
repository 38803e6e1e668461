"""A file of graded samples that grows a line at a time, so that what was killed goes on where it stood."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srrl_jax.checkpoints.files import read_json
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl


def open_lines(path: str | Path, kept: str | Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole lines that `path` holds already; what a kill left of another is cut off.

    Makes its directory if there is none. `settings` decide the lines and are written to `kept`.
    Under "identity" they may hold hashes of what is named there but may have changed (`identity_of`), which
    are not compared where older lines lack them.
    Raises InputError when the lines were made with other settings, or `path` is no file of lines.
    """
    path, kept, settings = Path(path), Path(kept), json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give the name of a file")
    if path.exists():
        old = read_json(kept)
        if not old:
            raise InputError(
                f"{path}: is there, but not {kept.name}, which says how it was made; give another"
            )
        differ = [
            f"{k} was {old.get(k)!r}, now {v!r}"
            for k, v in settings.items()
            if k != "identity" and old.get(k) != v
        ]
        if differ:
            raise InputError(
                f"{path} was made with other settings: {'; '.join(differ)}. Give them, or another place"
            )
        known, now = old.get("identity", {}), settings.get("identity", {})
        changed = [name for name, value in now.items() if known.get(name, value) != value]
        if changed:
            raise InputError(
                f"{path} was made with other {', '.join(changed)}, which have changed where they lie (hashes "
                f"are in {kept.name}). Give what they were, or another place"
            )
    kept.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if not path.exists():
        return []
    lines, data = read_jsonl(path), path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return lines


def check_rows(path: str | Path, compared: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuses lines that were made from other rows than those given now.

    Args:
      compared: the name of a row, what its line has of it, and what it is now.
    """
    changed = (name for name, was, now in compared if was != json.loads(json.dumps(now)))
    other = list(dict.fromkeys(changed))
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise InputError(
            f"{path}: the rows of its lines have changed since: {', '.join(other[:3])}{more}. "
            "Give the rows as they were, or another place"
        )


def append_lines(path: str | Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes lines at the end of `path`."""
    with Path(path).open("ab") as file:
        file.writelines(map(_encode, lines))


def write_results(directory: str | Path, results: dict[str, Any]) -> None:
    """Writes `directory/results.json`; makes the directory if there is none."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (Path(directory) / "results.json").write_text(text + "\n", encoding="utf-8")


def _encode(line: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which a model may write, becomes its backslash form.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
