"""What a person sees while a run lasts: what it does now, how long it will take, the main metrics."""

import statistics
import threading
import time
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
)
from rich.table import Table
from rich.text import Text

from srrl_jax.telemetry.run_log import PHASES
from srrl_jax.telemetry.text import duration, number

COLUMNS = {
    "reward/mean": "reward",
    "eval/self": "eval",
    "eval/frozen": "by frozen",
    "grader/agreement_frozen": "agreement",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grader/unscorable": "unscorable",
    "grad_norm": "grad norm",
}


DOING = {
    "relayout": "moving weights",
    "rollout": "sampling",
    "grade": "grading",
    "logprob": "scoring",
    "update": "learning",
    "eval": "evaluating",
    "checkpoint": "saving",
}
"""What a run does in each phase, for people."""

SLOW = 10.0
"""Seconds after which a phase has a line of its own, where there is no terminal."""


class LiveTable:
    """A context manager that shows progress over ``steps``.

    On a terminal: a bar, what is being done or compiled, the time left of the step and of the run, and a
    table of the latest metrics. Elsewhere (a pipe, a CI log): one line a step, and one for each phase that
    takes longer than SLOW. Print through ``.console`` so that messages land above the table.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self.console = console or Console()
        self._steps, self._done = steps, 0
        self._latest: dict[str, float] = {}
        self._seconds: list[float] = []  # of each step of this process
        self._began = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=steps)
        self._phase = self._note = self._program = ""
        self._live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def resume(self, done: int) -> None:
        """Count ``done`` steps as done before this process; they say nothing of its speed."""
        self._done = done
        self._progress.reset(self._task, completed=done)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show ``name`` as what is running now, for as long as the block lasts."""
        before, self._phase = self._phase, name
        self._note = ""
        if self._live:
            self._live.refresh()
        timer = threading.Timer(SLOW, self._tell_slow)
        if not (self._live or self.console.quiet):
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._phase, self._note = before, ""

    def note(self, text: str) -> None:
        """Show ``text`` (how far it has come) beside the phase that is running."""
        self._note = text

    def compiling(self, program: str) -> None:
        """Show the name of the program that is being compiled; an empty one when that is over."""
        self._program = program.removeprefix("jit(").removesuffix(")")

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Report ``metrics`` with ``step`` steps done; metrics not in it keep their last value."""
        now = time.monotonic()
        if step > self._done:
            self._seconds.append(now - self._began)
        self._began, self._done = now, step
        self._latest |= metrics
        self._progress.update(self._task, completed=step)
        if self._live:
            self._live.refresh()
        else:
            self.console.print(self._line(step, metrics), soft_wrap=True)

    def _left(self) -> tuple[float, float] | None:
        """Seconds left of the step under way and of the run; none where nothing tells."""
        if not self._seconds or self._done >= self._steps:
            return None
        usual = statistics.median(
            self._seconds[-20:]
        )  # so the first, which compiles, soon counts for nothing
        step = max(usual - (time.monotonic() - self._began), 0.0)
        return step, step + usual * (self._steps - self._done - 1)

    def _now(self) -> str:
        """What is being done, e.g. "sampling 24/128, compiling decode"."""
        doing = f"{DOING.get(self._phase, self._phase)} {self._note}".strip()
        return ", ".join(filter(None, [doing, self._program and f"compiling {self._program}"]))

    def _tell_slow(self) -> None:
        line = f"step {self._done + 1}/{self._steps}  {self._now()}, {duration(SLOW)} so far"
        self.console.print(Text(line), soft_wrap=True)

    def _line(self, step: int, metrics: dict[str, float]) -> Text:
        values = [f"{label} {number(metrics[key])}" for key, label in COLUMNS.items() if key in metrics]
        left = [f"{duration(self._left()[1])} left"] if self._left() else []
        parts = [f"step {step}/{self._steps}", *values, _times(metrics), *left]
        return Text("  ".join(filter(None, parts)))

    def _render(self) -> Group:
        table = Table(box=None, expand=True, header_style="dim", pad_edge=False)
        for label in COLUMNS.values():
            table.add_column(label, justify="right", no_wrap=True)
        table.add_row(*(number(self._latest.get(key)) for key in COLUMNS))
        now = Text(self._now(), style="bold cyan")
        if left := self._left():
            now.append(f"  {duration(left[0])} of this step left, {duration(left[1])} of the run")
        now.append(f"  last step: {_times(self._latest) or '–'}", style="dim not bold")
        return Group(self._progress, table, now)


def _times(metrics: dict[str, float]) -> str:
    """Seconds of each phase, e.g. "rollout 3.1 s, grade 5.2 s"."""
    times = {phase: metrics.get(f"time/{phase}") for phase in PHASES}
    return ", ".join(f"{phase} {duration(t)}" for phase, t in times.items() if t)
