"""`srrl rubrics`."""

import json
from typing import Annotated, Literal

import typer

from srrl_jax.options import Dtype, Fields, Json, Mesh, Seed, Temperature, fields_of, runtime_of

app = typer.Typer(
    help="Rubrics for prompts that have none, and rubrics put to the test.", no_args_is_help=True
)

Batch = Annotated[int, typer.Option(min=1, help="Prompts at one time.")]
Tokens = Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")]


@app.command("write")
def write(
    prompts: Annotated[str, typer.Argument(help="Rows with prompts; rubrics of theirs are not read.")],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="Rows with rubrics; again resumes.")],
    writer: Annotated[str, typer.Option(help="A checkpoint, or a teacher's .yaml.")],
    tries: Annotated[int, typer.Option(min=1, help="Replies before a prompt is left out.")] = 3,
    max_new_tokens: Tokens = 2048,
    temperature: Temperature = 0.6,
    thinking: Annotated[bool, typer.Option(help="Let the writer think.")] = False,
    batch: Batch = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
    field: Fields = None,
) -> None:
    """Write a rubric for each prompt, with signed points; exit code 1 where a prompt got none."""
    from srrl_jax.evaluation.judge import AnswerConfig
    from srrl_jax.evaluation.rubrics import write_rubrics
    from srrl_jax.sampling import SamplingConfig

    sampling = SamplingConfig(temperature=temperature, top_k=20, top_p=0.95)
    written, failed = write_rubrics(
        prompts,
        out,
        writer=writer,
        fields=fields_of(field),
        config=AnswerConfig(max_new_tokens, thinking, sampling),
        tries=tries,
        runtime=runtime_of(batch, dtype, mesh, seed),
    )
    for line in failed:
        print(f"no rubric for {line}")
    print(f"{written} new rows in {out}, {len(failed)} prompts without a rubric")
    raise typer.Exit(1 if failed else 0)


@app.command("audit")
def audit(
    rows: Annotated[str, typer.Argument(help="Rows with rubrics, as srrl data check reads them.")],
    model: Annotated[str, typer.Option(help="The checkpoint that answers, or a name for --completions.")],
    out: Annotated[str, typer.Option(help="Directory of the page and the cleaned rows; again resumes.")],
    samples: Annotated[int, typer.Option("--samples", "-n", min=2, help="Answers to each row.")] = 8,
    grader: Annotated[str, typer.Option(help="Checkpoint, teacher's .yaml, or policy for MODEL.")] = "policy",
    completions: Annotated[str | None, typer.Option(help="Lines of prompt_id and completion.")] = None,
    second: Annotated[
        str | None,
        typer.Option(help="The other way of asking: generate, constrained, logits, or a template."),
    ] = None,
    verdict: Annotated[
        Literal["generate", "constrained", "logits"], typer.Option(help="The first way.")
    ] = "generate",
    template: Annotated[str, typer.Option(help="shared, healthbench, or a file.")] = "shared",
    max_new_tokens: Tokens = 1024,
    grader_max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a verdict.")] = 256,
    temperature: Temperature = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.")] = None,
    batch: Batch = 8,
    dtype: Dtype = "float32",
    mesh: Mesh = "",
    seed: Seed = 0,
    field: Fields = None,
    as_json: Json = False,
) -> None:
    """Answer each row several times and say what its criteria are worth: which to keep, rewrite or drop."""
    from srrl_jax.evaluation.judge import AnswerConfig
    from srrl_jax.evaluation.rubrics import audit_rubrics, counts
    from srrl_jax.grading import JudgeConfig
    from srrl_jax.run.export import exported
    from srrl_jax.sampling import SamplingConfig

    found = audit_rubrics(
        rows,
        out,
        model=exported(model),
        grader=exported(grader),
        completions=completions,
        fields=fields_of(field),
        limit=limit,
        samples=samples,
        second=second,
        answering=AnswerConfig(max_new_tokens, False, SamplingConfig(temperature=temperature)),
        judging=JudgeConfig(template=template, verdict=verdict, max_new_tokens=grader_max_new_tokens),
        runtime=runtime_of(batch, dtype, mesh, seed),
    )
    told = counts(found)
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"keep {told['keep']}, rewrite {told['rewrite']}, drop {told['drop']} criteria of {told['rows']} rows"
    )
    print(f"page: {out}/audit.html; cleaned: {out}/rows.jsonl ({told['rows_left_out']} rows left out)")
