"""`srrl train --dry-run`: what a run would do, up to its first step."""

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.parallel import computing, make_mesh
from srrl_jax.parallel.chips import GIB
from srrl_jax.programs import Compiled, compile_ahead
from srrl_jax.run.checks import check_run, run_programs
from srrl_jax.sampling.shapes import default_budget
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import make_actor
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.memory import fits
from srrl_jax.training.tasks import Tasks, load_tasks


def dry_run(config: TrainConfig) -> None:
    """Prints the recipe as resolved and the profile of its rows, compiles all programs, and tells of them.

    The programs stay in JAX's cache; nothing is written into the run directory.

    Raises:
      InputError: what `train` would refuse before its first step.
    """
    console = Console()
    check_run(config)
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config, tokenizer)
    console.print(yaml.safe_dump(config.to_dict(), sort_keys=False), markup=False, highlight=False)
    console.print(_profile(tasks))
    for row in tasks.dropped:
        console.print(f"dropped: {row}", markup=False, soft_wrap=True)
    mesh, lengths = make_mesh(config.mesh), tasks.lengths(config)
    with computing(mesh, config.dtype, config.matmul_precision), Progress(console=console) as progress:
        model = build_model(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        learner = Learner(model, config, mesh, lengths.longest_prompt)
        programs = run_programs(config, actor, learner, learner.init_state())
        bar = progress.add_task("compiling", total=len(programs))

        def told(compiled: Compiled, total: int) -> None:
            progress.update(bar, advance=1, description=f"compiled {compiled.name}")

        with fits("compile"):
            found = compile_ahead(programs, mesh, told)
    table = Table(title=f"{len(found)} programs; a device has {2 * default_budget() / GIB:.1f} GiB")
    for name in ("program", "seconds", "GiB of a device"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for each in found:
        table.add_row(each.name, f"{each.seconds:.1f}", f"{each.bytes / GIB:.2f}")
    console.print(table)
    device = jax.local_devices()[0]
    console.print(f"{jax.device_count()} x {device.device_kind}; without --dry-run the first step comes now")


def _profile(tasks: Tasks) -> Table:
    table = Table(title="rows")
    for name in ("", "rows", "median", "longest"):
        table.add_column(name, justify="right" if name else "left")
    for name, rows in (("training", tasks.train), ("held out", tasks.held_out), ("lessons", tasks.lessons)):
        sizes = {"prompt, tokens": [len(task.prompt) for task in rows]}
        if rows and rows[0].asked:
            sizes["criteria"] = [len(task.example.rubrics) for task in rows]
            sizes["criterion, tokens"] = [max(task.asked.branches) for task in rows]
        for what, values in sizes.items() if rows else ():
            table.add_row(f"{name}: {what}", str(len(rows)), f"{np.median(values):g}", str(max(values)))
    return table
