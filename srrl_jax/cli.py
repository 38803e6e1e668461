"""The `srrl` command."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from srrl_jax.errors import InputError
from srrl_jax.options import Dtype, Fields, Json, Mesh, Seed, Temperature, fields_of, finite, runtime_of
from srrl_jax.rubrics_cli import app as rubrics_app
from srrl_jax.starting import init, list_recipes
from srrl_jax.viewer.command import view

if TYPE_CHECKING:
    from srrl_jax.grading import JudgeConfig

# With these libtpu gathers the weights that `fsdp` cuts while it multiplies; without, it waits for each.
TPU_FLAGS = "--xla_enable_async_all_gather=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"

app = typer.Typer(
    help="Self-rewarding, rubric-based reinforcement learning in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at rows, and bring them into another form.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(rubrics_app, name="rubrics")
app.command("view")(view)
app.command("recipes")(list_recipes)
app.command("init")(init)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"srrl {version('srrl-jax')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


# Options that several of these commands have.
Template = Annotated[
    str, typer.Option(help="shared, healthbench, or a file: simple-evals' healthbench_eval.py is one.")
]
Verdict = Annotated[
    Literal["generate", "constrained", "logits"],
    typer.Option("--verdict", help="A reply with its reason; true or false drawn alone; the likelier one."),
]
Votes = Annotated[int, typer.Option(min=1, help="Replies or draws for each criterion; odd.")]
Together = Annotated[bool, typer.Option(help="All criteria of a rubric in one query.")]
Tries = Annotated[int, typer.Option(min=1, help="Replies before a verdict is unscorable.")]
VerdictTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a verdict.")]
GraderThinks = Annotated[bool, typer.Option(help="Let the grader think.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.")]


@app.command("train")
def _train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a recipe by name: see srrl recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. steps=10 data.train=rows.jsonl")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(envvar="SRRL_COORDINATOR", metavar="HOST:PORT", help="Address of process 0.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(envvar="SRRL_PROCESSES", min=1, help="Number of processes.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(envvar="SRRL_PROCESS", min=0, help="Number of this process, from 0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile all programs, say what they take, and stop there.")
    ] = False,
) -> None:
    """Train by self-rewarding GRPO; on an existing run directory, resume.

    On TPU slices and under SLURM or Open MPI the processes find each other; elsewhere give
    --coordinator, --processes and --process.
    """
    from srrl_jax.parallel import abort_all_on_error, is_main, join
    from srrl_jax.run import train
    from srrl_jax.training import TrainConfig

    resolved = TrainConfig.load(config, overrides or [])
    if dry_run:
        from srrl_jax.run.dry_run import dry_run as describe

        return describe(resolved)
    join(coordinator, processes, process)
    with abort_all_on_error():
        train(resolved)
        if is_main():
            _report(resolved.run_dir)


@app.command("plan")
def _plan(
    config: Annotated[str, typer.Argument(help="A YAML file, or a recipe by name: see srrl recipes.")],
    topology: Annotated[str, typer.Option(help="v5p:4x4x4, v6e:4x4, v5e:2x4, h100:4x8 or cpu:8.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")
    ] = None,
    slices: Annotated[int, typer.Option(min=1, help="Equal slices, over the mesh axis slice.")] = 1,
    as_json: Json = False,
    completion: Annotated[
        float | None,
        typer.Option(
            min=1, callback=finite, help="Mean tokens of a completion; by default half of the limit."
        ),
    ] = None,
    verdict: Annotated[
        float | None,
        typer.Option(
            min=1, callback=finite, help="Mean tokens of the grader's reply; by default half of the limit."
        ),
    ] = None,
    criteria: Annotated[
        float, typer.Option(min=1, callback=finite, help="Mean number of criteria of a row.")
    ] = 12,
    tries: Annotated[float, typer.Option(min=1, callback=finite, help="Mean replies to a criterion.")] = 1,
    longest_prompt: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 4096,
    longest_criterion: Annotated[int, typer.Option(min=1, help="Tokens of the longest criterion.")] = 256,
    most_criteria: Annotated[int, typer.Option(min=1, help="Criteria of the row that has most.")] = 48,
) -> None:
    """Compile a recipe for devices that are not here: does it fit (else exit code 1), how long is it?"""
    from srrl_jax.planning.chips import Topology
    from srrl_jax.planning.command import run_plan

    fits = run_plan(
        config,
        overrides or [],
        Topology.parse(topology, slices),
        as_json=as_json,
        completion=completion,
        verdict=verdict,
        criteria=criteria,
        tries=tries,
        longest_prompt=longest_prompt,
        longest_criterion=longest_criterion,
        most_criteria=most_criteria,
    )
    raise typer.Exit(0 if fits else 1)


@app.command("status")
def _status(
    run_dir: Annotated[str, typer.Argument(help="A run directory, here or gs://.")], as_json: Json = False
) -> None:
    """Say on one screen where a run stands, from any machine that can read its directory."""
    from rich.console import Console

    from srrl_jax.telemetry.status import read_status, status_table

    found = read_status(run_dir)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(status_table(found))


@app.command("report")
def _report(run_dir: Annotated[str, typer.Argument(help="A run directory.")]) -> None:
    """Write RUN_DIR/report.html from the logs of a run."""
    from srrl_jax.viewer.report import write_report

    print(f"report: {write_report(run_dir)}")


@app.command("export")
def _export(
    run_dir: Annotated[str, typer.Argument(help="A run directory.")],
    out: Annotated[str, typer.Argument(help="The directory to write.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint; the newest by default.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights in the files.")
    ] = "float32",
    adapter: Annotated[bool, typer.Option("--adapter", help="Of LoRA the adapters alone, for peft.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to this hub repository.")
    ] = None,
) -> None:
    """Write the trained model as a directory that transformers loads, with a model card."""
    from srrl_jax.run.export import export

    print(f"step {export(run_dir, out, step, dtype, adapter=adapter, push=push)}: {out}")


@app.command("replay")
def _replay(
    run_dir: Annotated[str, typer.Argument(help="A run directory.")],
    step: Annotated[int, typer.Option(min=1, help="A training step of it, counted from 1.")],
    as_json: Json = False,
) -> None:
    """Compute a step of a run again from its logs, and compare; exit code 1 where something differs."""
    from rich.console import Console
    from rich.table import Table

    from srrl_jax.run.replay import replay

    found, start = replay(run_dir, step)
    if as_json:
        print(json.dumps([row._asdict() | {"verdict": row.verdict} for row in found], indent=1))
        raise typer.Exit(int(any(row.verdict == "DIFFERS" for row in found)))
    table = Table(title=f"{run_dir}: step {step}, computed again from step {start}")
    for column in ("", "logged", "replayed", ""):
        table.add_column(column, overflow="fold")
    for row in found:
        table.add_row(row.name, str(row.logged), str(row.replayed), row.verdict)
    Console().print(table, markup=False)
    if any(row.verdict == "DIFFERS" for row in found):
        raise typer.Exit(1)


@data_app.command("check")
def _check(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file of rows, a directory, or a hub id.")],
    tokenizer: Annotated[str | None, typer.Option(help="Checkpoint whose tokenizer measures.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt, as rendered.")] = None,
    max_points: Annotated[
        float, typer.Option(min=0, callback=finite, help="Most points of a criterion, in size.")
    ] = 10,
    thinking: Annotated[bool, typer.Option(help="Render prompts with thinking on.")] = False,
    field: Fields = None,
    as_json: Json = False,
) -> None:
    """Name every fault of every row and print a profile; exit code 1 when there is any fault."""
    from rich.console import Console

    from srrl_jax.checkpoints.tokenizer import load_tokenizer
    from srrl_jax.data.check import check_rows, counts, profile, summary

    checked = check_rows(
        source,
        tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
        thinking=thinking,
        max_prompt_tokens=max_prompt_tokens,
        max_points=max_points,
        fields=fields_of(field),
    )
    if as_json:
        print(json.dumps(summary(checked), indent=1))
        raise typer.Exit(1 if checked.faults else 0)
    for fault in checked.faults:
        print(fault)
    if checked.examples:
        Console().print(profile(checked))
        print("\n".join(counts(checked)))
    print(f"{checked.rows} rows, {len(checked.faults)} faults")
    raise typer.Exit(1 if checked.faults else 0)


@data_app.command("convert")
def _convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file of rows, a directory, or a hub id.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new file or directory.")],
    to: Annotated[Literal["jsonl", "tfds"], typer.Option(help="tfds is array_record files.")] = "jsonl",
    minus: Annotated[str | None, typer.Option(help="Rows to leave out, by prompt_id.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="theme:hedging, axis:accuracy, consensus, ...")
    ] = None,
    field: Fields = None,
) -> None:
    """Write rows in another form, whole or in part: Easy is main --minus hard."""
    from srrl_jax.data.convert import convert

    rows = convert(source, out, to, minus=minus, where=where or (), fields=fields_of(field))
    print(f"{rows} rows in {out}")


@app.command("sample")
def _sample(
    model: Annotated[str, typer.Argument(help="Checkpoint: directory or hub id, HF or GGUF.")],
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Rows with `prompt`.")],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="A line of each sample; again resumes.")],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Samples of each row.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 1024,
    temperature: Temperature = 0.6,
    top_k: Annotated[int, typer.Option(min=0)] = 20,
    top_p: Annotated[float, typer.Option(min=0, max=1, callback=finite)] = 0.95,
    min_p: Annotated[float, typer.Option(min=0, max=1, callback=finite)] = 0.0,
    thinking: Annotated[bool, typer.Option(help="Let MODEL think before it answers.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at one time.")] = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
) -> None:
    """Sample completions of prompts; shapes follow from the rows."""
    from srrl_jax.evaluation.judge import AnswerConfig
    from srrl_jax.evaluation.lines import sample_file
    from srrl_jax.sampling import SamplingConfig

    config = AnswerConfig(max_new_tokens, thinking, SamplingConfig(temperature, top_k, top_p, min_p))
    runtime = runtime_of(batch, dtype, mesh, seed)
    lines = sample_file(model, source, out, samples=samples, config=config, runtime=runtime)
    print(f"{lines} new lines in {out}")


def _judging(
    template: str,
    tries: int,
    votes: int,
    together: bool,
    max_new_tokens: int,
    verdict: str,
    thinking: bool,
    temperature: float,
) -> "JudgeConfig":
    """How weights are asked to judge, from the options of a command."""
    from srrl_jax.grading import JudgeConfig

    return JudgeConfig(
        template=template,
        tries=tries,
        votes=votes,
        together=together,
        max_new_tokens=max_new_tokens,
        verdict=verdict,
        thinking=thinking,
        sampling=dataclasses.replace(JudgeConfig.sampling, temperature=temperature),
    )


@app.command("grade")
def _grade(
    model: Annotated[str, typer.Argument(help="The grader: a checkpoint, or a teacher's .yaml.")],
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Rows with prompt, rubrics, completion.")],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="The rows with verdicts; again resumes.")],
    verdict: Verdict = "generate",
    votes: Votes = 1,
    together: Together = False,
    template: Template = "shared",
    max_new_tokens: VerdictTokens = 256,
    temperature: Temperature = 0.6,
    tries: Tries = 3,
    thinking: GraderThinks = False,
    batch: Annotated[int, typer.Option(min=1, help="Responses at one time.")] = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
) -> None:
    """Grade completions against the rubrics of their rows; shapes follow from the rows."""
    from srrl_jax.evaluation.lines import grade_file

    config = _judging(template, tries, votes, together, max_new_tokens, verdict, thinking, temperature)
    lines = grade_file(model, source, out, config=config, runtime=runtime_of(batch, dtype, mesh, seed))
    print(f"{lines} new lines in {out}")


@app.command("evaluate")
def _evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Checkpoint (HF, GGUF, RUN_DIR or RUN_DIR@STEP) or a name for --completions."),
    ],
    rows: Annotated[str, typer.Argument(help="Rows with rubrics, as srrl data check reads them.")],
    out: Annotated[str, typer.Option(help="Directory of samples and results; the same again resumes.")],
    completions: Annotated[str | None, typer.Option(help="Lines of prompt_id and completion.")] = None,
    grader: Annotated[
        str, typer.Option(help="Checkpoint, teacher's .yaml, or policy for MODEL itself.")
    ] = "policy",
    repeats: Annotated[int, typer.Option(min=1, help="Responses to each row.")] = 1,
    where: Annotated[list[str] | None, typer.Option(metavar="TAG", help="As in data convert.")] = None,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 1024,
    temperature: Temperature = 0.6,
    thinking: Annotated[bool, typer.Option(help="Let MODEL think before it answers.")] = False,
    verdict: Verdict = "generate",
    votes: Votes = 1,
    together: Together = False,
    template: Template = "shared",
    grader_max_new_tokens: VerdictTokens = 256,
    grader_temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="Of the verdicts; 0 is greedy.")
    ] = 0.6,
    grader_thinking: GraderThinks = False,
    tries: Tries = 3,
    batch: Annotated[int, typer.Option(min=1, help="Prompts, or responses to grade, at one time.")] = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
    field: Fields = None,
    length_penalty: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="Of the length-adjusted score, for 500 characters beyond 2000."
        ),
    ] = 0.0147,
    as_json: Json = False,
) -> None:
    """Score a checkpoint, or ready completions, on rows: overall, per theme, per axis, with error."""
    from srrl_jax.evaluation.commands import run_evaluate
    from srrl_jax.evaluation.judge import AnswerConfig
    from srrl_jax.run.export import exported
    from srrl_jax.sampling import SamplingConfig

    run_evaluate(
        exported(model),
        rows,
        out,
        completions=completions,
        grader=exported(grader),
        repeats=repeats,
        where=where or [],
        limit=limit,
        fields=fields_of(field),
        length_penalty=length_penalty,
        as_json=as_json,
        answering=AnswerConfig(
            max_new_tokens, thinking, SamplingConfig(temperature=temperature, top_k=20, top_p=0.95)
        ),
        judging=_judging(
            template,
            tries,
            votes,
            together,
            grader_max_new_tokens,
            verdict,
            grader_thinking,
            grader_temperature,
        ),
        runtime=runtime_of(batch, dtype, mesh, seed),
    )


@app.command("meta-evaluate")
def _meta_evaluate(
    grader: Annotated[str, typer.Argument(help="Checkpoint, teacher's .yaml, or .jsonl of ready verdicts.")],
    labels: Annotated[str, typer.Argument(help="Rows of conversation, criterion and labels.")],
    out: Annotated[str, typer.Option(help="Directory of samples and results; the same again resumes.")],
    limit: Limit = None,
    verdict: Verdict = "generate",
    votes: Votes = 1,
    together: Together = False,
    template: Template = "shared",
    max_new_tokens: VerdictTokens = 256,
    temperature: Temperature = 0.6,
    thinking: GraderThinks = False,
    tries: Tries = 3,
    batch: Annotated[int, typer.Option(min=1, help="Responses to grade at one time.")] = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a grader against physicians' labels: F1 of met and not met, per category, baselines."""
    from srrl_jax.evaluation.commands import run_meta_evaluate
    from srrl_jax.run.export import exported

    run_meta_evaluate(
        exported(grader),
        labels,
        out,
        limit=limit,
        as_json=as_json,
        judging=_judging(template, tries, votes, together, max_new_tokens, verdict, thinking, temperature),
        runtime=runtime_of(batch, dtype, mesh, seed),
    )


def main() -> None:
    """Runs the command line; bad input ends with one message on stderr and exit code 2.

    Compiled programs are kept in the user's cache folder, or where JAX_COMPILATION_CACHE_DIR says. Flags for
    libtpu that the user sets come after ours, so they win.
    """
    os.environ["LIBTPU_INIT_ARGS"] = f"{TPU_FLAGS} {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip()
    if "jax" not in sys.modules:  # which reads it once, when it is imported
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "srrl_jax" / "programs"))
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"  # of a GPU; JAX alone would take 0.75
    try:
        app()
    except InputError as error:
        print(f"srrl: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if type(end) is SystemExit and end.code == 130:  # typer's, for Ctrl-C; `train` tells of its own
            print("srrl: interrupted; what is written stays, and the same command goes on", file=sys.stderr)
        raise
