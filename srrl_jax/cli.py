"""The `srrl` command."""

import sys
from typing import Annotated

import typer

from srrl_jax.errors import InputError

app = typer.Typer(
    help="Self-rewarding, rubric-based reinforcement learning in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """A callback keeps sub-commands sub-commands while there are few."""


@app.command("train")
def _train(
    config: Annotated[str, typer.Argument(help="A recipe, e.g. configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. steps=10 data.train=rows.jsonl")
    ] = None,
) -> None:
    """Train by self-rewarding GRPO; on an existing run directory, resume."""
    from srrl_jax.training import TrainConfig, train

    resolved = TrainConfig.load(config, overrides or [])
    train(resolved)
    _report(resolved.run_dir)


@app.command("report")
def _report(run_dir: Annotated[str, typer.Argument(help="A run directory.")]) -> None:
    """Write RUN_DIR/report.html from the logs of a run."""
    from srrl_jax.telemetry.report import write_report

    print(f"report: {write_report(run_dir)}")


def main() -> None:
    """Runs the command line; bad input ends with one message on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"srrl: {error}", file=sys.stderr)
        sys.exit(2)
