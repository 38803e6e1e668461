"""`srrl sample` and `srrl grade`: JSON lines in, JSON lines out, resumed where they stopped."""

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from srrl_jax.errors import InputError
from srrl_jax.evaluation.judge import (
    AnswerConfig,
    Checkpoint,
    Runtime,
    check_items,
    identity_of,
    open_judge,
)
from srrl_jax.evaluation.samples import append_lines, check_rows, open_lines
from srrl_jax.grading import GradingItem, JudgeConfig
from srrl_jax.locking import sole_writer
from srrl_jax.rubrics import Example, row_faults, score_response, text_faults, visible_response
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.telemetry.signs import completion_shares, tell, verdict_shares

Row = tuple[str, dict[str, Any], Example]  # its id in OUT, the line as it stands, what it says
_ANY = [{"criterion": "any", "points": 1}]  # `sample` asks for no rubric


def sample_file(
    model: str,
    source: str,
    out: str,
    *,
    samples: int,
    config: AnswerConfig,
    runtime: Runtime,
) -> int:
    """Adds completions to rows: OUT gets a line of each sample. Returns the number of new lines.

    A line is the row with `sample_id` ("prompt_id:line:sample"), `prompt_id`, `completion`, `response`
    (what a user would see), `tokens`, `truncated`. The text depends on row, sample and seed alone.
    Raises InputError: a bad row (file:line), or an OUT that was made with other settings, or that another
    process writes.
    """
    settings = {"command": "sample", "model": model, "samples": samples} | runtime.settings
    rows = _rows(
        source, lambda row: {"prompt": row.get("prompt"), "rubrics": _ANY, "prompt_id": row.get("prompt_id")}
    )

    def run(part: Sequence[Row]) -> Iterator[dict[str, Any]]:
        ids = [zlib.crc32(name.encode()) for name, _, _ in part]
        groups = checkpoint.answers(
            [e.prompt for *_, e in part], ids, jax.random.key(runtime.seed), config, samples
        )
        for (name, row, example), group in zip(part, groups, strict=True):
            for j, answer in enumerate(group):
                if f"{name}:{j}" not in done:
                    yield (
                        row | {"sample_id": f"{name}:{j}", "prompt_id": example.prompt_id} | answer._asdict()
                    )

    with sole_writer(f"{out}.writer"):
        checkpoint = Checkpoint(model, runtime)
        more = {"sampling": dataclasses.asdict(config), "identity": identity_of(checkpoint, None)}
        lines = _open(out, settings | more, rows)
        done = {line["sample_id"] for line in lines}
        todo = [row for row in rows if any(f"{row[0]}:{j}" not in done for j in range(samples))]
        checkpoint.check_prompts([(name, e.prompt) for name, _, e in todo], config)
        count, chunk = lambda line: line["tokens"], 4 * runtime.batch
        return _work(out, todo, chunk, run, "tokens", count, _completion_shares)


def grade_file(model: str, source: str, out: str, *, config: JudgeConfig, runtime: Runtime) -> int:
    """Adds verdicts to rows that hold `completion` or `response`. Returns the number of new lines.

    A line is the row with `grade_id` ("prompt_id:line"), `prompt_id`, `reward` (null where nothing could
    be scored) and `verdicts`, one {criterion, points, met, probability, explanation, tries} for each
    criterion, with the single `votes` where there are several. `model` is a checkpoint, or the YAML of a
    teacher.
    Raises InputError: a bad row (file:line), or an OUT that was made with other settings, or that another
    process writes.
    """
    rows = _rows(source, lambda row: row)
    for (_, row, _), where in zip(rows, _places(source), strict=True):
        if "response" not in row and "completion" not in row:
            raise InputError(f"{where}: no text to grade; add `completion` or `response`")
        if faults := text_faults(row, "response" if "response" in row else "completion"):
            raise InputError(f"{where}: {faults[0]}")
    settings = {"command": "grade", "model": model} | runtime.settings
    with (
        sole_writer(f"{out}.writer"),
        open_judge(model, config, runtime) as judge,
    ):
        more = {"grading": judge.settings, "identity": identity_of(None, judge)}
        done = {line["grade_id"] for line in _open(out, settings | more, rows)}
        todo = [row for row in rows if row[0] not in done]

        items = {name: GradingItem(e.prompt, _response(row), e.rubrics) for name, row, e in todo}
        check_items(judge, list(items.items()))

        def run(part: Sequence[Row]) -> Iterator[dict[str, Any]]:
            graded = judge.grade([items[name] for name, _, _ in part])
            for (name, row, example), verdicts in zip(part, graded, strict=True):
                judged = [
                    {"criterion": c.criterion, "points": c.points, "met": v.met, "probability": v.probability,
                     "explanation": v.explanation, "tries": v.tries} | v.logged
                    for c, v in zip(example.rubrics, verdicts, strict=True)
                ]  # fmt: skip
                reward = score_response(example.rubrics, [v.met for v in verdicts])
                added = {"grade_id": name, "prompt_id": example.prompt_id, "reward": reward}
                yield row | added | {"verdicts": judged}

        count, chunk = lambda line: len(line["verdicts"]), 4 * runtime.batch
        return _work(out, todo, chunk, run, "verdicts", count, _verdict_shares)


def _completion_shares(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    return completion_shares((line["prompt_id"], line["response"], line["truncated"]) for line in lines)


def _verdict_shares(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    return verdict_shares(verdict["met"] for line in lines for verdict in line["verdicts"])


def _response(row: dict[str, Any]) -> str:
    return row["response"] if "response" in row else visible_response(row["completion"])


def _places(source: str) -> list[str]:
    with Path(source).open("rb") as file:
        return [f"{source}:{number}" for number, line in enumerate(file, 1) if line.strip()]


def _rows(source: str, view: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Row]:
    rows = []
    for index, (where, row) in enumerate(
        zip(_places(source) if Path(source).is_file() else [], iter_jsonl(source), strict=True)
    ):
        faults = row_faults(view(row))
        if faults:
            raise InputError(f"{where}: {faults[0]}")
        example = Example.from_dict(view(row))
        rows.append((f"{example.prompt_id}:{index}", row, example))
    if not rows:
        raise InputError(f"{source}: no such file, or no rows in it; give a .jsonl file")
    return rows


def _open(out: str, settings: dict[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines that OUT holds, which have to be of these rows where they are of their names."""
    lines = open_lines(out, f"{out}.settings.json", settings)
    given = {name: row for name, row, _ in rows}
    fields = (
        ("prompt",) if settings["command"] == "sample" else ("prompt", "rubrics", "completion", "response")
    )
    compared = []
    for line in lines:
        name = line.get("grade_id") or line["sample_id"].rpartition(":")[0]
        if name in given:
            compared.append((name, [line.get(f) for f in fields], [given[name].get(f) for f in fields]))
    check_rows(out, compared)
    return lines


def _work(out: str, todo: Sequence[Row], chunk: int, run, unit: str, count, shares) -> int:
    """Runs the rows chunk by chunk; the lines of a chunk are written before the next one starts.

    Warns by the `shares` of lines (see `srrl_jax.telemetry.signs`) after the first chunk and at the end.
    """
    seen, told, total = [], set(), 0
    began = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(todo))
        for start in range(0, len(todo), chunk):
            part = todo[start : start + chunk]
            made = list(run(part))
            append_lines(out, made)
            seen += made
            total += sum(map(count, made))
            if start == 0 or start + chunk >= len(todo):
                tell(shares(seen), told)
            rate = total / (time.perf_counter() - began)
            bar.update(task, advance=len(part), description=f"{rate:.1f} {unit}/s")
    return len(seen)
