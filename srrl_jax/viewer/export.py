"""`srrl view --export`: the page as files that open without a server."""

import json
from pathlib import Path

from srrl_jax import storage
from srrl_jax.viewer.index import Index
from srrl_jax.viewer.queries import QUERIES, ROW

STATIC = Path(__file__).parent / "static"


def export(index: Index, out: str) -> Path:
    """Writes the page, the answers that do not depend on filters, and every sample, a file a step.

    The page filters and sorts by itself (`static/offline.js`). Files: `data.js`, for each run `samples-N.js`
    (a line of the list for each sample) and `steps/N-STEP.js` (whole samples). Returns `out/index.html`.
    """
    folder = storage.locate(out)
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    for file in STATIC.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def ask(question: str, **params: str) -> dict:
        return QUERIES[question](index, params)

    names = [run.name for run in index.runs]
    answers: dict = {
        "state": ask("state"),
        "compare": {split: ask("compare", split=split) for split in ("eval", "train")},
        "options": [ask("options", run=name) for name in names],
        "overview": [ask("overview", run=name) for name in names],
        "label": [ask("label", run=name) | {"here": None} for name in names],
        "criteria": [
            {
                by: {split: ask("criteria", run=name, by=by, split=split) for split in ("", *splits)}
                for by in ("criterion", "axis", "theme")
            }
            for name in names
            for splits in [ask("options", run=name)["split"]]
        ],
    }
    (folder / "data.js").write_bytes(f"const EXPORT = {_js(answers)};\n".encode())
    for number in range(len(names)):
        rows = index.ask(f"SELECT {ROW}, criteria FROM samples WHERE run = ? ORDER BY id", [number])
        axes = index.ask("SELECT DISTINCT criterion, axis FROM verdicts WHERE run = ?", [number])
        listed = {"rows": rows, "axes": {row["criterion"]: row["axis"] for row in axes}}
        _write(folder, f"samples-{number}.js", listed)
        steps: dict[int, list[int]] = {}
        for row in rows:
            steps.setdefault(row["step"], []).append(row["id"])
        for step, ids in steps.items():
            _write(folder, f"steps/{number}-{step}.js", {id: index.row(number, id) for id in ids})
    return folder / "index.html"


def _write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_bytes(f"ANSWERS[{json.dumps(name)}] = {_js(value)};\n".encode())


def _js(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
