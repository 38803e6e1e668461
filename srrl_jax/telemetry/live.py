"""What a person sees while a run lasts: a progress bar and the main metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from srrl_jax.telemetry.run_log import PHASES
from srrl_jax.telemetry.text import duration, number

COLUMNS = {
    "reward/mean": "reward",
    "eval/self": "eval",
    "eval/frozen": "by frozen",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grader/unscorable": "unscorable",
    "grad_norm": "grad norm",
}


class LiveTable:
    """A context manager that shows progress over ``steps``.

    On a terminal: a bar with elapsed and remaining time, the phase that is running, and a table of
    the latest metrics. Elsewhere (a pipe, a CI log): one line a step. Print through ``.console`` so
    that messages land above the table.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self.console = console or Console()
        self._steps = steps
        self._latest: dict[str, float] = {}
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            expand=True,
            speed_estimate_period=3600,  # the default, 30 s, forgets the last step of a slow run
        )
        self._task = self._progress.add_task("train", total=steps)
        self._phase = self._note = ""
        self._live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def resume(self, done: int) -> None:
        """Count ``done`` steps as done before this process; they say nothing of its speed."""
        self._progress.reset(self._task, completed=done)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show ``name`` as what is running now, for as long as the block lasts."""
        before, self._phase = self._phase, name
        self._note = ""
        if self._live:
            self._live.refresh()
        try:
            yield
        finally:
            self._phase, self._note = before, ""

    def note(self, text: str) -> None:
        """Show ``text`` (how far it has come) beside the phase that is running."""
        self._note = text

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Report ``metrics`` with ``step`` steps done; metrics not in it keep their last value."""
        self._latest |= metrics
        self._progress.update(self._task, completed=step)
        if self._live:
            self._live.refresh()
        else:
            self.console.print(self._line(step, metrics), soft_wrap=True)

    def _line(self, step: int, metrics: dict[str, float]) -> Text:
        values = [f"{label} {number(metrics[key])}" for key, label in COLUMNS.items() if key in metrics]
        return Text("  ".join([f"step {step}/{self._steps}", *values, _times(metrics)]).rstrip())

    def _render(self) -> Group:
        table = Table(box=None, expand=True, header_style="dim", pad_edge=False)
        for label in COLUMNS.values():
            table.add_column(label, justify="right", no_wrap=True)
        table.add_row(*(number(self._latest.get(key)) for key in COLUMNS))
        now = Text(f"{self._phase} {self._note}", style="bold cyan").append(
            f"  last step: {_times(self._latest) or '–'}", style="dim not bold"
        )
        return Group(self._progress, table, now)


def _times(metrics: dict[str, float]) -> str:
    """Seconds of each phase, e.g. "rollout 3.1 s, grade 5.2 s"."""
    times = {phase: metrics.get(f"time/{phase}") for phase in PHASES}
    return ", ".join(f"{phase} {duration(t)}" for phase, t in times.items() if t)
