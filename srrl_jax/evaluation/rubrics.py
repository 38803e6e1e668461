"""`srrl rubrics write` and `srrl rubrics audit`: rubrics made by a model, and rubrics put to the test."""

import dataclasses
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2

from srrl_jax.actor import Answer
from srrl_jax.data import load_examples
from srrl_jax.data.sources import Prompt, load_prompts
from srrl_jax.errors import InputError
from srrl_jax.evaluation.evaluate import answers_of, check_lengths, ready_answers
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint, CheckpointJudge, Runtime, identity_of
from srrl_jax.evaluation.samples import append_lines, open_lines
from srrl_jax.grading import GradingItem, Judge, JudgeConfig, Teacher, TeacherConfig
from srrl_jax.grading.endpoint import Endpoint
from srrl_jax.locking import sole_writer
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.rubrics.statistics import Audit, audit
from srrl_jax.rubrics.writing import parse_criteria, writer_prompt

Ask = Callable[[Sequence[tuple[str, int]]], Sequence[str]]
"""The replies to (prompt, number of the try) pairs; "" where there is none."""

WAYS = ("generate", "constrained", "logits")


def write_rubrics(
    source: str,
    out: str,
    *,
    writer: str,
    fields: Mapping[str, str],
    config: AnswerConfig,
    tries: int,
    runtime: Runtime,
) -> tuple[int, list[str]]:
    """Writes a row with a rubric for each prompt of a source that OUT has none for.

    A reply that cannot be read (`parse_criteria`) is drawn again, up to `tries` times.

    Returns:
      The number of new rows, and the prompts that got none, each with what was wrong with the last reply.
    Raises:
      InputError: a bad prompt, an OUT that was made otherwise or that another process writes, or a writer
        that cannot be used.
    """
    prompts = load_prompts(source, fields)
    settings = {"command": "rubrics write", "writer": writer, "answering": dataclasses.asdict(config)}
    settings |= runtime.settings
    written, failed = 0, []
    with sole_writer(f"{out}.writer"), open_writer(writer, config, runtime) as (ask, identity):
        settings["identity"] = identity
        done = {line["prompt_id"] for line in open_lines(out, f"{out}.settings.json", settings)}
        todo = [prompt for prompt in prompts if prompt.example.prompt_id not in done]
        for start in range(0, len(todo), runtime.batch):
            rows = []
            for example, fault in _written(todo[start : start + runtime.batch], ask, tries, writer):
                if fault:
                    failed.append(f"{example.prompt_id}: {fault}")
                else:
                    rows.append(example.to_dict())
            append_lines(out, rows)
            written += len(rows)
            print(f"{min(start + runtime.batch, len(todo))} of {len(todo)} prompts", file=sys.stderr)
    return written, failed


def _written(prompts: Sequence[Prompt], ask: Ask, tries: int, writer: str) -> Iterator[tuple[Example, str]]:
    """The examples with rubrics; with a fault, in their order, those that got none."""
    found: dict[int, list[Criterion]] = {}
    faults: dict[int, str] = {}
    for attempt in range(tries):
        unread = [i for i in range(len(prompts)) if i not in found]
        if not unread:
            break
        asked = [(writer_prompt(prompts[i].example.prompt, prompts[i].reference), attempt) for i in unread]
        for i, reply in zip(unread, ask(asked), strict=True):
            try:
                found[i] = parse_criteria(reply)
            except ValueError as error:
                faults[i] = str(error)
    for i, (example, _) in enumerate(prompts):
        tags = (*example.example_tags, f"rubrics:{Path(writer).name}")
        rubrics = tuple(found[i]) if i in found else example.rubrics
        yield (
            dataclasses.replace(example, rubrics=rubrics, example_tags=tags),
            "" if i in found else faults[i],
        )


@contextmanager
def open_writer(writer: str, config: AnswerConfig, runtime: Runtime) -> Iterator[tuple[Ask, dict[str, str]]]:
    """Whom a command names as writer: a checkpoint, or the endpoint of a teacher's YAML
    with its cache; and the `identity_of` a checkpoint."""
    if writer.endswith((".yaml", ".yml")):
        with Endpoint(TeacherConfig.load(writer)) as endpoint:
            try:
                yield lambda asked: [reply.text if reply else "" for reply in endpoint.ask(asked)], {}
            finally:
                print(f"writer {endpoint.config.model}: {endpoint.usage}", file=sys.stderr)
        return
    checkpoint = Checkpoint(writer, runtime)

    def ask(asked: Sequence[tuple[str, int]]) -> list[str]:
        ids = [zlib.crc32(f"{attempt} {prompt}".encode()) for prompt, attempt in asked]
        turns = [[{"role": "user", "content": prompt}] for prompt, _ in asked]
        return [
            reply.response for reply in checkpoint.answer(turns, ids, jax.random.key(runtime.seed), config)
        ]

    yield ask, identity_of(checkpoint, None)


class AuditedRow(NamedTuple):
    """A row with what was found of each of its criteria."""

    example: Example
    criteria: list[Audit]


def audit_rubrics(
    source: str,
    out: str,
    *,
    model: str,
    grader: str,
    completions: str | None,
    fields: Mapping[str, str],
    limit: int | None,
    samples: int,
    second: str | None,
    answering: AnswerConfig,
    judging: JudgeConfig,
    runtime: Runtime,
) -> list[AuditedRow]:
    """Answers each row several times, asks about each criterion in two ways, and says what each is worth.

    Writes into OUT: samples.jsonl (a line for each answer with both verdicts, as it goes), audit.html,
    audit.jsonl (a line for each criterion) and rows.jsonl, the rows without what is advised to drop.

    Args:
      second: the other way of asking: "generate", "constrained", "logits", or a template. By default logits
        of a checkpoint, and of a teacher the template healthbench (or what is not the first way).
    Raises:
      InputError: as `run_evaluate` does.
    """
    judging.read_template()
    examples = load_examples(source, fields)[:limit]
    ready = ready_answers(model, completions, examples, samples) if completions else None
    with sole_writer(f"{out}/writer"):
        own = grader in ("policy", model) and not _is_teacher(grader)
        policy = None if ready and not own else Checkpoint(model, runtime)
        with _two_judges(policy if own else grader, judging, second, runtime) as judges:
            settings = {"rows": source, "model": model, "samples": samples} | runtime.settings
            settings |= {"answering": dataclasses.asdict(answering)} if ready is None else ready.settings
            settings |= {"fields": dict(fields), "judging": [judge.settings for judge in judges]}
            settings["identity"] = identity_of(policy, judges[0])
            lines = open_lines(f"{out}/samples.jsonl", f"{out}/settings.json", settings)
            seen = {(line["prompt_id"], line["sample"]): line for line in lines}
            todo = [e for e in examples if any((e.prompt_id, k) not in seen for k in range(samples))]
            answers = ready or answers_of(policy, answering, {}, runtime.seed)
            check_lengths(answers, judges, [(e, k) for e in todo for k in range(samples if ready else 1)])
            for start in range(0, len(todo), runtime.batch):
                part = todo[start : start + runtime.batch]
                if ready:
                    groups = [ready.answer([e] * samples, range(samples)) for e in part]
                else:
                    ids = [zlib.crc32(e.prompt_id.encode()) for e in part]
                    key = jax.random.key(runtime.seed)
                    groups = policy.answers([e.prompt for e in part], ids, key, answering, samples)
                new = [
                    line
                    for line in _judged(part, groups, judges)
                    if (line["prompt_id"], line["sample"]) not in seen
                ]
                append_lines(f"{out}/samples.jsonl", new)
                seen |= {(line["prompt_id"], line["sample"]): line for line in new}
                print(f"{min(start + runtime.batch, len(todo))} of {len(todo)} rows", file=sys.stderr)
    found = [_audited(e, [seen[e.prompt_id, k]["criteria"] for k in range(samples)]) for e in examples]
    write_audit(found, Path(out), source=source, model=model, samples=samples)
    return found


def _judged(
    examples: Sequence[Example], groups: Sequence[Sequence[Answer]], judges: Sequence[Judge]
) -> list[dict[str, Any]]:
    pairs = [
        (e, k, answer) for e, group in zip(examples, groups, strict=True) for k, answer in enumerate(group)
    ]
    items = [GradingItem(e.prompt, answer.response, e.rubrics) for e, _, answer in pairs]
    first, second = (judge.grade(items) for judge in judges)
    return [
        {
            "prompt_id": e.prompt_id,
            "sample": k,
            "response": answer.response,
            "criteria": [
                {"criterion": c.criterion, "points": c.points, "verdict": a.met, "second": b.met}
                for c, a, b in zip(e.rubrics, one, other, strict=True)
            ],
        }
        for (e, k, answer), one, other in zip(pairs, first, second, strict=True)
    ]


def _audited(example: Example, answers: Sequence[Sequence[dict[str, Any]]]) -> AuditedRow:
    columns = zip(*answers, strict=True)
    return AuditedRow(
        example,
        [
            audit(c.points, [item["verdict"] for item in column], [item["second"] for item in column])
            for c, column in zip(example.rubrics, columns, strict=True)
        ],
    )


def cleaned(row: AuditedRow) -> Example | None:
    """The row without criteria to drop, those to rewrite tagged; None where no positive points are left."""
    rubrics = tuple(
        dataclasses.replace(c, tags=(*c.tags, "audit:rewrite")) if found.advice == "rewrite" else c
        for c, found in zip(row.example.rubrics, row.criteria, strict=True)
        if found.advice != "drop"
    )
    left = any(c.points > 0 for c in rubrics)
    return dataclasses.replace(row.example, rubrics=rubrics) if left else None


def counts(rows: Sequence[AuditedRow]) -> dict[str, int]:
    """How many criteria to keep, rewrite and drop, and rows of which nothing could be rewarded any more."""
    advice = [found.advice for row in rows for found in row.criteria]
    return {name: advice.count(name) for name in ("keep", "rewrite", "drop")} | {
        "rows": len(rows),
        "rows_left_out": sum(cleaned(row) is None for row in rows),
    }


def write_audit(rows: Sequence[AuditedRow], out: Path, **told: Any) -> None:
    """Writes audit.html, audit.jsonl and rows.jsonl into `out`; `told` is for the head of the page."""
    found = [
        {"prompt_id": row.example.prompt_id, "criterion": c.criterion, "points": c.points} | a._asdict()
        for row in rows
        for c, a in zip(row.example.rubrics, row.criteria, strict=True)
    ]
    kept = [example.to_dict() for row in rows if (example := cleaned(row)) is not None]
    for name, lines in (("audit", found), ("rows", kept)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_bytes(text.encode("utf-8", errors="backslashreplace"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("audit.html").render(rows=rows, counts=counts(rows), **told)
    (out / "audit.html").write_bytes(page.encode("utf-8", errors="replace"))


def _is_teacher(grader: str) -> bool:
    return grader.endswith((".yaml", ".yml"))


@contextmanager
def _two_judges(
    grader: str | Checkpoint, config: JudgeConfig, second: str | None, runtime: Runtime
) -> Iterator[Sequence[CheckpointJudge | Teacher]]:
    """The judge as the options have it, and the same asked otherwise."""
    if isinstance(grader, str) and _is_teacher(grader):
        if config != JudgeConfig():
            raise InputError(f"{grader}: how a teacher is asked stands in its file; leave the options out")
        first = TeacherConfig.load(grader)
        other = second or ("shared" if first.template == "healthbench" else "healthbench")
        if other in WAYS:
            raise InputError(f"--second {other}: a teacher is asked by its text alone; give another template")
        if other == first.template:
            raise InputError(f"--second {other}: is the first way; give another template")
        with Teacher(first) as one, Teacher(dataclasses.replace(first, template=other)) as two:
            try:
                yield one, two
            finally:
                for teacher in (one, two):
                    print(
                        f"teacher {teacher.name}, {teacher.config.template}: {teacher.usage}", file=sys.stderr
                    )
        return
    other = second or ("generate" if config.verdict == "logits" else "logits")
    if other in (config.verdict, config.template):
        raise InputError(
            f"--second {other}: is the first way; give another of {', '.join(WAYS)}, or a template"
        )
    if other in WAYS:
        plain = {"votes": 1, "together": False, "thinking": False}
        changed = dataclasses.replace(config, verdict=other, **plain)
    else:
        changed = dataclasses.replace(config, template=other)
    changed.read_template()
    checkpoint = Checkpoint(grader, runtime) if isinstance(grader, str) else grader
    keys = jax.random.split(jax.random.key(runtime.seed))
    yield [CheckpointJudge(checkpoint, how, key) for how, key in zip((config, changed), keys, strict=True)]
