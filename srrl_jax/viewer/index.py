"""The samples of runs as DuckDB tables, which grow with the logs."""

import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from hashlib import md5
from itertools import islice

import duckdb
import pyarrow as pa
from etils import epath

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.run_log import iter_jsonl

BATCH = 1000  # samples of one insert
LOGS = [f"{name}.jsonl" for name in ("metrics", "timings", "events", "labels")]  # small: not kept here
JUDGES = ("self", "frozen", "teacher", "own")

_TYPES = {
    "step": "BIGINT", "split": "VARCHAR", "prompt_id": "VARCHAR", "sample": "BIGINT", "reward": "DOUBLE",
    "advantage": "DOUBLE", "tokens": "BIGINT", "truncated": "BOOLEAN", "example_tags": ["VARCHAR"],
    "prompt": [{"content": "VARCHAR"}], "response": "VARCHAR",
}  # fmt: skip
_CRITERION = {"criterion": "VARCHAR", "points": "DOUBLE", "tags": ["VARCHAR"], "verdict": "BOOLEAN"}
_CRITERION |= dict.fromkeys(JUDGES[1:], "BOOLEAN")
_KEY = "md5({0})[:10]"  # of a criterion's text, the same in every run, so that a link can hold it
_TAG = "coalesce(list_filter({1}, lambda t: starts_with(t, '{0}:'))[1][len('{0}:') + 1:], '')"
_MARKS = (
    "array_to_string([CASE WHEN c.{0} THEN '1' WHEN NOT c.{0} THEN '0' ELSE '?' END FOR c IN criteria], '')"
)
_GIVEN = ", ".join(f"c.{name}::INT" for name in ("verdict", *JUDGES[1:]))


def _parsed(searched: bool) -> str:
    """A query on `lines` for what `samples` holds of them, and the texts of prompt and criteria beside it.

    A judge's column holds one mark a criterion, NULL where it did not grade. The whole row stays in the log,
    `size` bytes from `start` of its part; a search looks through `text`, "" where nothing is `searched`.
    """
    more = {"completion": "VARCHAR"} if searched else {}
    types = _TYPES | more | {"criteria": [_CRITERION | ({"explanation": "VARCHAR"} if searched else {})]}
    judged = [f"contains(line, '\"{name}\":') AS has_{name}" for name in JUDGES[1:]]
    marks = [f"CASE WHEN has_{name} THEN {_MARKS.format(name)} END AS {name}" for name in JUDGES[1:]]
    texts = "lower(array_to_string([completion] || [c.explanation FOR c IN criteria], chr(10)))"
    return f"""
SELECT run, id, part, start, size, step, split, prompt_id, sample, reward, advantage, tokens, truncated,
    left(response, 200) AS head, {texts if searched else "''"} AS text,
    {_MARKS.format("verdict")} AS self, {", ".join(marks)},
    coalesce(list_sum([(greatest({_GIVEN}) > least({_GIVEN}))::INT FOR c IN criteria]), 0)::INT AS differ,
    {_TAG.format("theme", "example_tags")} AS theme,
    [{_KEY.format("c.criterion")} FOR c IN criteria] AS criteria,
    [{_TAG.format("axis", "c.tags")} FOR c IN criteria] AS axes,
    [c.points FOR c IN criteria] AS points,
    [c.criterion FOR c IN criteria] AS asked,
    array_to_string([turn.content FOR turn IN prompt], chr(10)) AS prompt, prompt[-1].content[:200] AS last
FROM (SELECT * EXCLUDE line, {", ".join(judged)}, unnest(from_json(line, '{json.dumps(types)}'))
      FROM lines)"""


_LINES = pa.schema(
    [(name, pa.int64()) for name in ("run", "id", "part", "start", "size")] + [("line", pa.string())]
)
_VERDICT = "CASE {0}[k] WHEN '1' THEN 1 WHEN '0' THEN 0 END AS {0}"
# What these tables get of `new`, in this order.
_TABLES = {
    "criteria": f"""
SELECT DISTINCT {_KEY.format("text")} AS criterion, text FROM (SELECT unnest(asked) AS text FROM new)""",
    "prompts": "SELECT prompt_id, min(prompt) AS text, min(last) AS head FROM new GROUP BY prompt_id",
    "samples": "SELECT * EXCLUDE (asked, prompt, last) FROM new",
}
_VERDICTS = f"""
SELECT * EXCLUDE k, k - 1 AS k, greatest({", ".join(JUDGES)}) > least({", ".join(JUDGES)}) AS differ
FROM (SELECT run, id, step, split, prompt_id, theme, tokens, k, criteria[k] AS criterion, axes[k] AS axis,
             points[k] AS points, {", ".join(map(_VERDICT.format, JUDGES))}
      FROM (SELECT * EXCLUDE (text, head), unnest(range(1, len(criteria) + 1)) AS k FROM {{0}}))"""
_ONCE = {"criteria": "criterion", "prompts": "prompt_id"}  # tables that hold each of these once


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

    Args:
      searched: whether many questions will be asked, such as for samples by their text, which most of the
        database is; the report asks few.

    Tables: `samples`, `verdicts` (a row for each criterion of each sample), `criteria` (text and axis by a
    key that is the same in all runs) and `prompts`. `refresh` reads what the logs have gained; `ask` may be
    called from any thread meanwhile.

    Raises:
      InputError: a path is not a run directory.
    """

    def __init__(self, runs: Sequence[str | os.PathLike], searched: bool = True):
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
        self._database.execute("PRAGMA disable_checkpoint_on_shutdown")  # the folder goes with it
        self._searched, self._parsed = searched, _parsed(searched)
        with self._database.cursor() as cursor:
            self._parse(cursor, [])
            for name, query in _TABLES.items():
                cursor.execute(f"CREATE TABLE {name} AS {query}")
            kind = "TABLE" if searched else "VIEW"  # which takes no memory, but a second for each question
            cursor.execute(f"CREATE {kind} verdicts AS {_VERDICTS.format('samples')}")

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
                return clean(json.loads(file.read(where["size"])))
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
                    for table in ("samples", "verdicts") if self._searched else ("samples",):
                        self._database.cursor().execute(f"DELETE FROM {table} WHERE run = ?", [number])
                    run.restart()
                run.version += run.logs_changed()
            if sum(run.samples for run in self.runs) > before + 20 * BATCH:
                self._database.cursor().execute("CHECKPOINT")

    def _insert(self, number: int, run: Run, batch: list[tuple[int, int, bytes]]) -> None:
        lines = [
            {"run": number, "id": id, "part": part, "start": at, "size": len(line), "line": line}
            for id, (part, at, line) in enumerate(batch, start=run.samples)
        ]
        with self._database.cursor() as cursor:
            try:
                self._parse(cursor, lines)
            except (duckdb.Error, pa.ArrowInvalid):  # no JSON, or halves of surrogate pairs
                for each in lines:
                    try:
                        each["line"] = json.dumps(clean(json.loads(each["line"])), ensure_ascii=False)
                    except ValueError as error:
                        where = f"{run.tail.parts[each['part']]}: line {each['id'] + 1}"
                        raise InputError(f"{where}: not JSON ({error})") from None
                self._parse(cursor, lines)
            missing = "step IS NULL OR prompt_id IS NULL OR sample IS NULL OR criteria IS NULL"
            for (id,) in cursor.execute(f"SELECT id FROM new WHERE {missing} LIMIT 1").fetchall():
                raise InputError(f"{run.tail.log}: line {id + 1}: not a sample; delete the line")
            cursor.execute("BEGIN")
            for name, query in _TABLES.items():
                known = (
                    f" WHERE {_ONCE[name]} NOT IN (SELECT {_ONCE[name]} FROM {name})" if name in _ONCE else ""
                )
                cursor.execute(f"INSERT INTO {name} FROM ({query}){known}")
            if self._searched:
                cursor.execute(f"INSERT INTO verdicts {_VERDICTS.format('new')}")
            cursor.execute("COMMIT")
        run.samples += len(batch)
        run.version += 1

    def _parse(self, cursor: duckdb.DuckDBPyConnection, lines: Sequence[dict]) -> None:
        cursor.register("lines", pa.Table.from_pylist(lines, _LINES))
        cursor.execute(f"CREATE OR REPLACE TEMP TABLE new AS {self._parsed}")


def criterion_key(text: str) -> str:
    """What stands for a criterion in links and tables."""
    return md5(text.encode(), usedforsecurity=False).hexdigest()[:10]


def _size(parts: Sequence[epath.Path]) -> int:
    """Bytes of a log on a disk; in a store, where each object is written once, the number of them."""
    remote = bool(parts) and storage.is_remote(parts[0])
    return len(parts) if remote else sum(part.stat().length for part in parts)


def clean(value):
    """A JSON value without halves of surrogate pairs, which UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
