"""LiveTable on a terminal and off one."""

import io

import pytest
from rich.console import Console

from srrl_jax.telemetry import LiveTable


def shown(terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, _environ={}), out


def test_one_line_a_step_off_a_terminal():
    console, out = shown(terminal=False, width=20)
    with LiveTable(steps=3, console=console) as live:
        for step in range(1, 4):
            with live.phase("rollout"):
                pass
            live.update(step, {"reward/mean": 0.25 * step, "time/rollout": 3.14, "lr": 1.0})
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 1/3  reward 0.25  rollout 3.1 s",
        "step 2/3  reward 0.50  rollout 3.1 s",
        "step 3/3  reward 0.75  rollout 3.1 s",
    ]


def test_a_line_says_only_what_its_step_measured():
    console, out = shown(terminal=False)
    with LiveTable(steps=2, console=console) as live:
        live.update(1, {"eval/self": 0.5, "kl": None})
        live.update(2, {"reward/mean": 0.5})
    assert out.getvalue().splitlines() == ["step 1/2  eval 0.50  kl –", "step 2/2  reward 0.50"]


def test_table_on_a_terminal_shows_phase_progress_and_latest_values():
    console, out = shown(terminal=True)
    with LiveTable(steps=60, console=console) as live:
        live.resume(10)
        live.update(11, {"reward/mean": 0.31, "eval/self": 0.42, "time/grade": 5.2})
        live.update(12, {"reward/mean": 0.33})
        with live.phase("checkpoint"):
            console.print("a message in between")
    text = out.getvalue()
    last = text[text.rindex("12/60") :]
    assert "a message in between" in text
    assert "checkpoint" in text
    assert "0.33" in last and "0.42" in last and "grade 5.2 s" in last


def test_an_error_inside_ends_the_display_and_propagates():
    console, out = shown(terminal=True)
    with pytest.raises(KeyError, match="boom"), LiveTable(steps=2, console=console) as live:
        with live.phase("update"):
            raise KeyError("boom")
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back
