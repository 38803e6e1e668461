"""`srrl evaluate` and `srrl meta-evaluate`: load, run, save, print."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from srrl_jax.data import load_examples, select
from srrl_jax.evaluation.evaluate import Result, answers_of, evaluate, ready_answers
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint, Runtime, identity_of, open_judge
from srrl_jax.evaluation.labels import load_labels
from srrl_jax.evaluation.meta import MetaResult, grade_labels, meta_evaluate, ready_verdicts, save
from srrl_jax.evaluation.tables import (
    agreement_table,
    confusion_table,
    published_table,
    score_table,
    template_label,
)
from srrl_jax.grading import JudgeConfig
from srrl_jax.locking import sole_writer
from srrl_jax.telemetry import read_jsonl
from srrl_jax.telemetry.signs import completion_shares, tell, verdict_shares


def run_evaluate(
    model: str,
    rows: str,
    out: str,
    *,
    completions: str | None,
    grader: str,
    repeats: int,
    where: Sequence[str],
    limit: int | None,
    fields: Mapping[str, str],
    length_penalty: float,
    as_json: bool,
    answering: AnswerConfig,
    judging: JudgeConfig,
    runtime: Runtime,
) -> Result:
    """Scores a checkpoint or a file of completions; see `srrl evaluate --help`. Raises InputError."""
    judging.read_template()  # what is wrong with it is told before weights are loaded
    examples = select(load_examples(rows, fields), where)[:limit]
    ready = completions and ready_answers(model, completions, examples, repeats)
    with sole_writer(f"{out}/writer"):
        own = grader in ("policy", model)
        policy = None if ready and not own else Checkpoint(model, runtime)
        answers = ready or answers_of(
            policy, answering, {"answering": dataclasses.asdict(answering)}, runtime.seed
        )
        with (
            open_judge(policy if own else grader, judging, runtime) as judge,
            _progress("responses") as on_progress,
        ):
            template = template_label(judge.settings)
            settings = {
                "rows": rows,
                "where": list(where),
                **({"fields": dict(fields)} if fields else {}),
                "template": template,
                "judging": judge.settings,
                "identity": identity_of(policy, judge),
            } | runtime.settings
            result = evaluate(
                examples,
                answers,
                judge,
                out,
                settings=settings,
                repeats=repeats,
                chunk=4 * runtime.batch,
                length_penalty=length_penalty,
                on_progress=on_progress,
            )
    lines = read_jsonl(f"{out}/samples.jsonl")
    shares = completion_shares((line["prompt_id"], line["response"], line["truncated"]) for line in lines)
    shares |= verdict_shares(item["verdict"] for line in lines for item in line["criteria"])
    tell(shares, set())
    if as_json:
        print((Path(out) / "results.json").read_text(encoding="utf-8"), end="")
        return result
    console = Console()
    console.print(score_table(result, judge.name, template, length_penalty))
    console.print(published_table(result, model, f"{judge.name}, template {template}", Path(rows).name))
    if repeats > 1:
        print(f"each repeat: {', '.join(f'{mean:.3f}' for mean in result.repeats)}")
    print(
        f"grader {judge.name}, template {template}: "
        f"{result.unscorable:.1%} of verdicts unscorable; "
        f"{result.left_out} of {result.responses} responses without a score; results in {out}"
    )
    return result


def run_meta_evaluate(
    grader: str,
    labels: str,
    out: str,
    *,
    limit: int | None,
    as_json: bool,
    judging: JudgeConfig,
    runtime: Runtime,
) -> MetaResult:
    """Scores a checkpoint's or a file's verdicts; see `srrl meta-evaluate --help`. Raises InputError."""
    rows = load_labels(labels)
    digest = hashlib.sha256(repr(rows).encode("utf-8", "backslashreplace")).hexdigest()
    rows = rows[:limit]
    with sole_writer(f"{out}/writer"):
        settings = {"labels": labels, "labels_sha256": digest, "template": None}
        if grader.endswith(".jsonl"):
            verdicts = ready_verdicts(grader, len(rows))
        else:
            with (
                open_judge(grader, judging, runtime) as judge,
                _progress("labels") as on_progress,
            ):
                template = template_label(judge.settings)
                settings |= {"template": template, "judging": judge.settings} | runtime.settings
                settings["identity"] = identity_of(None, judge)
                verdicts = grade_labels(
                    rows, judge, out, settings=settings, chunk=4 * runtime.batch, on_progress=on_progress
                )
        result = meta_evaluate(rows, verdicts)
        save(result, out, {"grader": grader} | settings)
    tell(verdict_shares(verdicts), set())
    if as_json:
        print((Path(out) / "results.json").read_text(encoding="utf-8"), end="")
        return result
    console = Console()
    console.print(agreement_table(result, grader, settings["template"]))
    console.print(confusion_table(result))
    print(f"{result.rows} rows, {result.unscorable:.1%} of verdicts unscorable; results in {out}")
    return result


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
