"""A second writer is refused at once; what a killed one left stands in nobody's way."""

import json
import os
import subprocess
import sys
import time

import pytest

from srrl_jax import cli, locking
from srrl_jax.errors import InputError
from srrl_jax.locking import sole_writer
from srrl_jax.run import train

HOLDER = """
import sys
from srrl_jax.locking import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start():
    """Starts a process that holds a lock until its standard input is closed."""
    started = []

    def run(stem) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(stem)], **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_another_process_is_refused_until_the_first_one_ends_or_is_killed(start, tmp_path):
    stem = tmp_path / "run" / "writer"
    killed = start(stem)
    with pytest.raises(InputError, match=f"process {killed.pid} on .* writes here"), sole_writer(stem):
        pass
    killed.kill()
    killed.wait()
    assert json.loads((tmp_path / "run/writer.json").read_text())["process"] == killed.pid  # left behind
    ended = start(stem)
    with pytest.raises(InputError, match=f"process {ended.pid}"), sole_writer(stem):
        pass
    ended.communicate()
    with sole_writer(stem):
        assert json.loads((tmp_path / "run/writer.json").read_text())["process"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def lease(bucket, monkeypatch):
    monkeypatch.setattr(locking, "LEASE", 0.6)
    monkeypatch.setattr(locking, "RENEW", 0.1)
    return bucket / "run" / "writer"


def test_in_a_store_the_lease_is_renewed_and_then_gone(lease):
    with sole_writer(lease):
        time.sleep(1)  # more than the lease
        with pytest.raises(InputError, match=f"run/writer: process {os.getpid()} on"), sole_writer(lease):
            pass
    assert not lease.with_name("writer.json").exists()
    with sole_writer(lease):
        pass


def test_in_a_store_a_lease_that_nobody_renews_is_taken_over(lease):
    dead = {"host": "gone", "process": 1, "command": "srrl train", "started": "then", "token": "a"}
    lease.with_name("writer.json").write_text(json.dumps(dead))
    began = time.monotonic()
    with sole_writer(lease):
        assert json.loads(lease.with_name("writer.json").read_text())["process"] == os.getpid()
    assert time.monotonic() - began >= 0.6


def test_who_lost_its_lease_ends_at_once(lease, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    other = {"host": "other", "process": 2, "command": "srrl train", "started": "now", "token": "b"}
    with sole_writer(lease):
        lease.with_name("writer.json").write_text(json.dumps(other))
        time.sleep(0.5)
    assert set(codes) == {2} and "held by process 2 on other" in capsys.readouterr().err
    assert json.loads(lease.with_name("writer.json").read_text()) == other  # which is not taken away


@pytest.mark.parametrize(
    ("command", "stem"),
    [
        ("sample no.model {rows} OUT.jsonl", "OUT.jsonl.writer"),
        ("grade no.model {graded} OUT.jsonl", "OUT.jsonl.writer"),
        ("evaluate no.model {rows} --out OUT", "OUT/writer"),
        ("meta-evaluate no.jsonl {labels} --out OUT", "OUT/writer"),
        ("export run OUT", "OUT.writer"),
    ],
)
def test_commands_do_not_share_what_they_write(command, stem, recipe, tmp_path, monkeypatch, capsys):
    from srrl_jax.run.checks import write_config

    monkeypatch.chdir(tmp_path)
    write_config(recipe("run"))
    prompt = [{"role": "user", "content": "hello"}]
    row = {"prompt": prompt, "rubrics": [{"criterion": "greets", "points": 1}]}
    label = {"prompt": prompt, "completion": "hi", "rubric": "greets", "binary_labels": [True]}
    files = {"rows": row, "graded": row | {"completion": "hi"}, "labels": label}
    for name, line in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    command = command.format_map({name: f"{name}.jsonl" for name in files})
    monkeypatch.setattr(sys, "argv", ["srrl", *command.split()])
    with sole_writer(tmp_path / stem), pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err


def test_two_runs_do_not_share_a_directory(recipe, tmp_path):
    with sole_writer(tmp_path / "writer"), pytest.raises(InputError, match=f"process {os.getpid()} on"):
        train(recipe(tmp_path))
    assert not (tmp_path / "config.yaml").exists()
