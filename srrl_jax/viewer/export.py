"""`srrl view --export`: the page as files that open without a server."""

import json
from itertools import groupby, islice
from pathlib import Path

from srrl_jax import storage
from srrl_jax.telemetry.run_log import iter_jsonl
from srrl_jax.viewer.index import BATCH, Index, clean
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
    for number, run in enumerate(index.runs):
        axes = index.ask("SELECT DISTINCT criterion, axis FROM verdicts WHERE run = ?", [number])
        name = f"samples-{number}.js"
        with (folder / name).open("wb") as file:
            axis_of = {row["criterion"]: row["axis"] for row in axes}
            file.write(f"ANSWERS[{_js(name)}] = {{axes: {_js(axis_of)}, rows: [\n".encode())
            for start in range(0, run.samples, BATCH):
                where = f"run = {number} AND id >= {start} AND id < {start + BATCH} ORDER BY id"
                rows = index.ask(f"SELECT {ROW}, criteria FROM samples WHERE {where}")
                file.writelines(f"{_js(row)},\n".encode() for row in rows)
            file.write(b"]};\n")
        if run.samples:
            logged = enumerate(islice(iter_jsonl(run.tail.log), run.samples))
            for step, rows in groupby(logged, lambda numbered: numbered[1]["step"]):
                name = f"steps/{number}-{step}.js"
                whole = {id: clean(row) for id, row in rows}
                (folder / name).write_bytes(f"ANSWERS[{_js(name)}] = {_js(whole)};\n".encode())
    return folder / "index.html"


def _js(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
