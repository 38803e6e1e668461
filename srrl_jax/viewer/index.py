"""The samples of runs as DuckDB tables, which grow with the logs."""

import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice

import duckdb
import pyarrow as pa
from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.run_log import iter_jsonl

BATCH = 1000  # samples of one insert
LOGS = [f"{name}.jsonl" for name in ("metrics", "timings", "events", "labels")]  # small: not kept here
JUDGES = ("self", "frozen", "teacher")

_MARK = {True: "1", False: "0", None: "?"}
# `self`, `frozen` and `teacher` of a sample hold one mark a criterion, NULL where that judge did not grade.
# The whole row stays in the log, `size` bytes from `start` of its part; a search looks through `text`.
_SAMPLES = pa.schema(
    [(name, pa.int64()) for name in "run id step sample tokens differ part start size".split()]
    + [(name, pa.string()) for name in ("split", "prompt_id", "theme", *JUDGES, "head", "text")]
    + [(name, pa.list_(pa.string())) for name in ("criteria", "axes")]
    + [("points", pa.list_(pa.float64())), ("truncated", pa.bool_())]
    + [("reward", pa.float64()), ("advantage", pa.float64())]
)
_CRITERIA = pa.schema([("criterion", pa.string()), ("text", pa.string())])
_PROMPTS = pa.schema([(name, pa.string()) for name in ("prompt_id", "text", "head")])
_TABLES = {"criteria": _CRITERIA, "prompts": _PROMPTS, "samples": _SAMPLES}
_LOGGED = ("step", "split", "prompt_id", "sample", "reward", "advantage", "tokens", "truncated")
_VERDICT = "CASE substr({0}, k, 1) WHEN '1' THEN 1 WHEN '0' THEN 0 END AS {0}"
_VERDICTS = f"""
SELECT * EXCLUDE k, k - 1 AS k, greatest(self, frozen, teacher) > least(self, frozen, teacher) AS differ
FROM (SELECT run, id, step, split, prompt_id, theme, tokens, k, criteria[k] AS criterion, axes[k] AS axis,
             points[k] AS points, {", ".join(map(_VERDICT.format, JUDGES))}
      FROM (SELECT * EXCLUDE text, unnest(range(1, len(criteria) + 1)) AS k FROM new))"""


class Rewound(Exception):
    """A resumed run has taken its log back behind what was read of it."""


class Tail:
    """Follows a log on a disk or in a store; each look yields the whole lines that are new."""

    def __init__(self, log: epath.Path):
        self.log = log
        self.parts: list[epath.Path] = []
        self.ends: list[int] = []  # bytes read of each part
        self.size = 0
        self.last = (0, b"")  # where the last line of the last part began, and what it was

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(part, offset, line) of each new line. Raises Rewound where what was read is no longer there."""
        parts = storage.parts(self.log)
        self.size = _size(parts)
        if parts[: len(self.parts)] != self.parts:
            raise Rewound
        for number, part in enumerate(parts):
            if number < len(self.parts) and storage.is_remote(part):
                continue  # an object of a store is written once
            if number == len(self.parts):
                self.parts.append(part)
                self.ends.append(0)
                self.last = (0, b"")
            with part.open("rb") as file:
                file.seek(self.last[0])
                if file.read(len(self.last[1])) != self.last[1]:
                    raise Rewound
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the writer is in the midst of it
                    at = self.ends[number]
                    self.last, self.ends[number] = (at, line), at + len(line)
                    yield number, at, line


class Run:
    """A run directory, and how much of it has been read."""

    def __init__(self, path: str, name: str):
        self.folder = storage.locate(path)
        if not (self.folder / "config.yaml").is_file() and not storage.parts(self.folder / "metrics.jsonl"):
            raise InputError(f"{path}: no config.yaml or metrics.jsonl there; give the directory of a run")
        self.name = name
        self.restart()
        self.version = 0  # grows with every change, so that a page knows when to ask again

    def restart(self) -> None:
        self.tail = Tail(self.folder / "samples.jsonl")
        self.samples = 0
        self.logs: list[int] = []

    @property
    def progress(self) -> float:
        """The share of samples.jsonl that has been read."""
        done = len(self.tail.parts) if storage.is_remote(self.folder) else sum(self.tail.ends)
        return done / self.tail.size if self.tail.size else 1.0

    def logs_changed(self) -> bool:
        sizes = [_size(storage.parts(self.folder / log)) for log in LOGS]
        changed, self.logs = sizes != self.logs, sizes
        return changed

    def events(self) -> list[dict]:
        path = self.folder / "events.jsonl"
        return [clean(event) for event in iter_jsonl(path)] if storage.parts(path) else []


class Index:
    """The samples of some runs in a database of its own, which lies in a temporary folder.

    Tables: `samples`, `verdicts` (a row for each criterion of each sample), `criteria` (text and axis by a
    key that is the same in all runs) and `prompts`. `refresh` reads what the logs have gained; `ask` may be
    called from any thread meanwhile.

    Raises:
      InputError: a path is not a run directory.
    """

    def __init__(self, runs: Sequence[str | os.PathLike]):
        paths = [os.fspath(run).rstrip("/") for run in runs]
        depth = 1
        while len(set(names := ["/".join(path.split("/")[-depth:]) for path in paths])) < len(set(paths)):
            depth += 1
        self.runs = [Run(path, name) for name, path in dict(zip(names, paths, strict=True)).items()]
        self.fault = ""  # why reading has stopped
        self._folder = tempfile.TemporaryDirectory(prefix="srrl-index-")
        settings = {
            "memory_limit": "400MB",
            "threads": min(4, os.cpu_count() or 1),
            "checkpoint_threshold": "1TB",  # each packs a table's last rows anew: see `refresh`
        }
        self._database = duckdb.connect(f"{self._folder.name}/index.duckdb", config=settings)
        self._lock = threading.Lock()  # of `refresh`
        self._closing = False
        for name, schema in _TABLES.items():
            self._database.register("new", schema.empty_table())
            self._database.execute(f"CREATE TABLE {name} AS FROM new")
        self._database.execute(f"CREATE TABLE verdicts AS {_VERDICTS}")
        self._criteria: dict[str, str] = {}
        self._prompts: set[str] = set()

    def close(self) -> None:
        self._closing = True
        with self._lock:
            self._database.close()
            self._folder.cleanup()

    def __enter__(self) -> "Index":
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, name: str = "") -> int:
        """The number of a run; of the first one for no name. Raises InputError for an unknown one."""
        names = [run.name for run in self.runs]
        if name and name not in names:
            raise InputError(f"{name}: no such run here; there are {', '.join(names)}")
        return names.index(name) if name else 0

    def ask(self, sql: str, values: Sequence = ()) -> list[dict]:
        """The rows that a query finds; numbers that are not finite become None."""
        with self._database.cursor() as cursor:
            found = cursor.execute(sql, values)
            names = [column[0] for column in found.description]
            return [dict(zip(names, map(_finite, row), strict=True)) for row in found.fetchall()]

    def row(self, run: int, id: int) -> dict:
        """A sample as its log has it, all of it. Raises InputError where there is none such."""
        for where in self.ask("SELECT part, start, size FROM samples WHERE run = ? AND id = ?", [run, id]):
            with self.runs[run].tail.parts[where["part"]].open("rb") as file:
                file.seek(where["start"])
                return _read(file.read(where["size"]))
        raise InputError(f"{self.runs[run].name} has no sample {id}")

    def refresh(self) -> None:
        """Reads what the logs have gained since the last time."""
        with self._lock:
            before = sum(run.samples for run in self.runs)
            for number, run in enumerate(self.runs):
                try:
                    lines = run.tail.lines()
                    while not self._closing and (batch := list(islice(lines, BATCH))):
                        self._insert(number, run, batch)
                except Rewound:
                    for table in ("samples", "verdicts"):
                        self._database.cursor().execute(f"DELETE FROM {table} WHERE run = ?", [number])
                    run.restart()
                run.version += run.logs_changed()
            if sum(run.samples for run in self.runs) > before + 20 * BATCH:
                self._database.cursor().execute("CHECKPOINT")

    def _insert(self, number: int, run: Run, batch: list[tuple[int, int, bytes]]) -> None:
        tables: dict[str, list[dict]] = {name: [] for name in _TABLES}
        for id, (part, at, line) in enumerate(batch, start=run.samples):
            try:
                row = _read(line)
            except ValueError as error:
                raise InputError(f"{run.tail.parts[part]}: line {id + 1}: not JSON ({error})") from None
            if row["prompt_id"] not in self._prompts:
                self._prompts.add(row["prompt_id"])
                text = "\n".join(turn["content"] for turn in row["prompt"])
                head = row["prompt"][-1]["content"][:200]
                tables["prompts"].append({"prompt_id": row["prompt_id"], "text": text, "head": head})
            for text in [item["criterion"] for item in row["criteria"]]:
                if text not in self._criteria:
                    self._criteria[text] = criterion_key(text)
                    tables["criteria"].append({"criterion": self._criteria[text], "text": text})
            place = {"run": number, "id": id, "part": part, "start": at, "size": len(line)}
            tables["samples"].append(place | _columns(row, self._criteria))
        with self._database.cursor() as cursor:
            cursor.execute("BEGIN")
            for name, rows in tables.items():
                cursor.register("new", pa.Table.from_pylist(rows, _TABLES[name]))
                cursor.execute(f"INSERT INTO {name} FROM new")
            cursor.execute(f"INSERT INTO verdicts {_VERDICTS}")  # of `new`, which are samples now
            cursor.execute("COMMIT")
        run.samples += len(batch)
        run.version += 1


def criterion_key(text: str) -> str:
    """A short name of a criterion's text, the same in every run, so that a link can hold it."""
    return blake2b(text.encode(), digest_size=5).hexdigest()


def _columns(row: dict, keys: Mapping[str, str]) -> dict:
    """What `samples` holds of a row, its place in the log apart."""
    criteria = row["criteria"]
    others = [name for name in JUDGES[1:] if criteria and name in criteria[0]]
    marks = {"self": "".join([_MARK[item["verdict"]] for item in criteria])}
    marks |= {name: "".join([_MARK[item.get(name)] for item in criteria]) for name in others}
    texts = [row["completion"], *(item["explanation"] for item in criteria)]
    return (
        {name: row[name] for name in _LOGGED}
        | marks
        | {
            "criteria": [keys[item["criterion"]] for item in criteria],
            "axes": [_tag("axis:", item.get("tags")) for item in criteria],
            "points": [item["points"] for item in criteria],
            "differ": sum("0" in given and "1" in given for given in zip(*marks.values(), strict=True)),
            "theme": _tag("theme:", row.get("example_tags")),
            "head": row["response"][:200],
            "text": "\n".join(texts).lower(),
        }
    )


def _size(parts: Sequence[epath.Path]) -> int:
    """Bytes of a log on a disk; in a store, where each object is written once, the number of them."""
    remote = bool(parts) and storage.is_remote(parts[0])
    return len(parts) if remote else sum(part.stat().length for part in parts)


def _tag(kind: str, tags: Sequence[str] | None) -> str:
    return next((tag.removeprefix(kind) for tag in tags or () if tag.startswith(kind)), "")


def _read(line: bytes) -> dict:
    row = json.loads(line)
    return clean(row) if b"\\ud" in line or b"\\uD" in line else row


def clean(value):
    """A JSON value without halves of surrogate pairs, which UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
