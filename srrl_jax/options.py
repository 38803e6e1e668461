"""Options that commands of several files have, and what they stand for."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from srrl_jax.errors import InputError, check_finite

if TYPE_CHECKING:
    from srrl_jax.evaluation.judge import Runtime


def finite(value: float | None) -> float | None:
    """What every option of a float has as its callback: NaN passes a range."""
    try:
        check_finite(value)
    except InputError as error:
        raise typer.BadParameter(str(error).removeprefix(": ")) from None
    return value


Temperature = Annotated[float, typer.Option(min=0, callback=finite, help="Of the replies; 0 is greedy.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs, not a table.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]
Dtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Type of the weights and of the computation.")
]
Mesh = Annotated[
    str,
    typer.Option(
        metavar="AXIS=SIZE,...", help="As a recipe's mesh, e.g. data=2,tensor=4; by default fsdp over all."
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="NAME=FIELD",
        help="What the rows call prompt, rubrics, criterion or points, e.g. prompt=question.",
    ),
]


def runtime_of(batch: int, dtype: str, mesh: str, seed: int) -> "Runtime":
    """How checkpoints run. Raises InputError where `mesh` is none."""
    from srrl_jax.evaluation.judge import Runtime
    from srrl_jax.parallel import MeshConfig

    return Runtime(batch, dtype, MeshConfig.parse(mesh), seed)


def fields_of(given: list[str] | None) -> dict[str, str]:
    from srrl_jax.data.schemas import parse_fields

    return parse_fields(given)
