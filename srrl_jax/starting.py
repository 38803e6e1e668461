"""The commands `srrl recipes` and `srrl init`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from srrl_jax.errors import InputError
from srrl_jax.options import Json

_RECIPE = """\
# A first run of your own: the tiny model of the package on the rows beside this file, in a minute on a CPU.
# For a model of your own set `model`, give rows of your own, and take `default` in place of `demo`.
inherits: package:recipes/demo.yaml
run_dir: runs/first
data:
  train: rows.jsonl
steps: 3
prompts_per_step: 6
optimizer: {microbatch: 6}
eval: {rows: 6}
"""
_ROWS = 6


def recipes() -> dict[str, Path]:
    """The recipes of the package by name, each a YAML file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def list_recipes(as_json: Json = False) -> None:
    """List the recipes of the package; `srrl train NAME` takes one."""
    from rich.console import Console
    from rich.table import Table

    found = {name: _first_comment(path) for name, path in recipes().items()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("recipe", "", box=None)
    for name, what in found.items():
        table.add_row(name, what)
    Console().print(table, markup=False)


def init(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")]) -> None:
    """Write a recipe and six rows to start from, and say what to run."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is in use: give a new or an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    easy = Path(__file__).parent / "tinyworld" / "easy.jsonl"
    rows = easy.read_text(encoding="utf-8").splitlines(keepends=True)[:_ROWS]
    (directory / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (directory / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
    print(
        f"cd {directory}, then:\n"
        "  srrl data check rows.jsonl    # is anything wrong with the rows?\n"
        "  srrl train recipe.yaml        # three steps\n"
        "  srrl view runs/first          # read what was sampled, graded and learnt"
    )


def _first_comment(path: Path) -> str:
    """What the comment at the head of a recipe says first."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.lstrip("# ") for line in lines[:comment])
    return text.split(": srrl ")[0].split(". ")[0]
