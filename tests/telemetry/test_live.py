"""LiveTable on a terminal and off one."""

import io
import re
import time

import pytest
from rich.console import Console

from srrl_jax.telemetry import LiveTable, live


def shown(terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, _environ={}), out


def test_one_line_a_step_off_a_terminal():
    console, out = shown(terminal=False, width=20)
    with LiveTable(steps=3, console=console) as table:
        for step in range(1, 4):
            with table.phase("rollout"):
                pass
            table.update(step, {"reward/mean": 0.25 * step, "time/rollout": 3.14, "lr": 1.0})
    lines = [re.sub("  [0-9.e-]+ s left", "  LEFT", line) for line in out.getvalue().splitlines()]
    assert lines == [
        "step 1/3  reward 0.25  rollout 3.1 s  LEFT",
        "step 2/3  reward 0.50  rollout 3.1 s  LEFT",
        "step 3/3  reward 0.75  rollout 3.1 s",
    ]


def test_a_slow_phase_has_one_line_off_a_terminal(monkeypatch):
    """It says what is being compiled, without control characters; a quick phase says nothing."""
    monkeypatch.setattr(live, "SLOW", 0.05)
    console, out = shown(terminal=False)
    with LiveTable(steps=3, console=console) as table:
        table.resume(1)
        with table.phase("rollout"):
            table.note("3/8")
            table.compiling("decode")
            time.sleep(0.15)
            table.compiling("")
        with table.phase("grade"):
            pass
    assert out.getvalue() == "step 2/3  sampling 3/8, compiling decode, 0.05 s so far\n"


def test_a_terminal_shows_the_time_left_of_step_and_run(monkeypatch):
    clock = iter(range(0, 100_000, 100))  # each look at the clock is 100 s later
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    console, out = shown(terminal=True, width=140)
    with LiveTable(steps=60, console=console) as table:
        with table.phase("update"):
            table.update(1, {})
            table.update(2, {})
            time.sleep(0.3)  # a refresh
    assert re.search(r"learning.*of this step left, .* h \d\d min of the run", out.getvalue())


def test_a_line_says_only_what_its_step_measured():
    console, out = shown(terminal=False)
    with LiveTable(steps=2, console=console) as table:
        table.update(0, {"eval/self": 0.5, "kl": None})
        table.update(2, {"reward/mean": 0.5})
    assert out.getvalue().splitlines() == ["step 0/2  eval 0.50  kl –", "step 2/2  reward 0.50"]


def test_table_on_a_terminal_shows_phase_progress_and_latest_values():
    console, out = shown(terminal=True)
    with LiveTable(steps=60, console=console) as table:
        table.resume(10)
        table.update(11, {"reward/mean": 0.31, "eval/self": 0.42, "time/grade": 5.2})
        table.update(12, {"reward/mean": 0.33})
        with table.phase("checkpoint"):
            console.print("a message in between")
    text = out.getvalue()
    last = text[text.rindex("12/60") :]
    assert "a message in between" in text
    assert "saving" in text
    assert "0.33" in last and "0.42" in last and "grade 5.2 s" in last


def test_an_error_inside_ends_the_display_and_propagates():
    console, out = shown(terminal=True)
    with pytest.raises(KeyError, match="boom"), LiveTable(steps=2, console=console) as table:
        with table.phase("update"):
            raise KeyError("boom")
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back
