"""Bad input ends with one message on stderr and exit code 2, before anything is compiled."""

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
import typer
import yaml
from safetensors.numpy import load_file, save_file

from srrl_jax import cli
from srrl_jax.options import finite
from srrl_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs/demo.yaml"
CHECKPOINT = ROOT / "srrl_jax/tinyworld/checkpoint"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs `srrl train` on the demo's recipe with overrides; returns its message on stderr."""
    monkeypatch.chdir(ROOT)
    compiled, listening = [], [True]

    def listen(event, seconds, **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def run(*overrides: str, config=DEMO) -> str:
        run_dir = [] if any(o.startswith("run_dir=") for o in overrides) else [f"run_dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", ["srrl", "train", str(config), *run_dir, *overrides])
        before = sorted((tmp_path / "run").rglob("*"))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        assert exit.value.code == 2
        assert captured.err.startswith("srrl: ") and captured.err.count("srrl: ") == 1
        assert "Traceback" not in captured.err + captured.out
        assert not compiled
        assert sorted((tmp_path / "run").rglob("*")) == before  # nothing written
        return captured.err

    yield run
    listening.clear()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the embedded checkpoint to spoil."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def row(**changes) -> dict:
    return {
        "prompt": [{"role": "user", "content": "hello ."}],
        "rubrics": [{"criterion": "greets the guest .", "points": 3}],
        **changes,
    }


def rows(path: Path, *values: dict) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_bad_values(refused):
    assert "unknown key 'optimizer.learning_rte'" in refused("optimizer.learning_rte=1")
    assert "steps: Input should be a valid integer" in refused("steps=many")
    assert "form key=value" in refused("steps")
    assert "group_size: Input should be greater than or equal to 2, not 1" in refused("group_size=1")
    assert "asks for a multiple of 1024 devices" in refused("mesh.data=1024")


def commands(app):
    for group in app.registered_groups:
        yield from commands(group.typer_instance)
    for command in app.registered_commands:
        yield command.callback


def test_every_number_among_the_options_has_a_least_value_and_is_finite():
    numbers = 0
    for command in commands(cli.app):
        for name, annotation in inspect.get_annotations(command).items():
            kind, *info = get_args(annotation) or [annotation]
            if {int, float} & {kind, *get_args(kind)}:
                numbers += 1
                assert info[0].min is not None, (command.__name__, name)
                assert info[0].callback is finite or float not in {kind, *get_args(kind)}, name
    assert numbers > 40
    for value in (math.nan, math.inf, 1e39):
        with pytest.raises(typer.BadParameter, match="must be a finite number"):
            finite(value)


def test_files_that_are_not_there(refused, tmp_path):
    assert "no such config file" in refused(config=tmp_path / "none.yaml")
    assert f"{tmp_path / 'none'}" in refused(f"model={tmp_path / 'none'}")
    assert "none.jsonl: no such file" in refused(f"data.train={tmp_path / 'none.jsonl'}")
    assert "none.txt" in refused(f"grading.template={tmp_path / 'none.txt'}")
    assert "no tokenizer" in refused(f"model={tmp_path}")


def test_a_run_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "run_dir: cannot write" in refused(f"run_dir={tmp_path / 'file'}")


def test_a_row_without_rubrics_is_named_by_file_and_line(refused, tmp_path):
    bad = row(prompt=[{"role": "user", "content": "bye ."}])
    del bad["rubrics"]
    path = rows(tmp_path / "rows.jsonl", row(), bad)
    assert f"srrl: {path}:2: no `rubrics`" in refused(f"data.train={path}", "data.eval=null")


def test_rows_that_are_both_trained_on_and_held_out(refused):
    easy = "srrl_jax/tinyworld/easy.jsonl"
    assert "easy-0000" in refused(f"data.train={easy}", f"data.eval={easy}")


def test_a_prompt_that_is_too_long(refused, tmp_path):
    long = row(prompt=[{"role": "user", "content": "hello . " * 240}])
    path = rows(tmp_path / "rows.jsonl", row(), long)
    message = refused(f"data.train={path}", "data.eval=null")
    assert f"{path}: row 2" in message and "over 512" in message
    wordy = row(prompt=[{"role": "user", "content": "hello . " * 50}])
    rows(path, row(), long, wordy)
    message = refused(f"data.train={path}", "data.eval=null", "rollout.max_prompt_tokens=60")
    # What the model has no positions for is not for max_prompt_tokens to take.
    assert re.search(r"row 2 .* over 512\n.*row 3 .* over 60\n", message)
    assert re.search(r"max_new_tokens would have to be \d+ smaller to take 1 of them", message)
    assert re.search(r"rollout.max_prompt_tokens=1\d\d would take 1 of them", message)


def test_an_unsupported_model_type(refused, checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    message = refused(f"model={checkpoint}")
    assert f"{path}: model_type 'mamba' is not supported" in message


def test_a_missing_and_an_extra_tensor(refused, checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if name != "model.norm.weight"}, file)
    assert "lack tensor model.norm.weight" in refused(f"model={checkpoint}").replace("'", "")
    save_file(tensors | {"model.adapter.weight": np.zeros(2, np.float32)}, file)
    message = refused(f"model={checkpoint}")
    assert "'model.adapter.weight' is not part of the network" in message and str(file) in message


def test_replies_beyond_the_positions_of_the_model(refused):
    assert "the model has 512 positions" in refused("grading.max_new_tokens=600")


def test_another_recipe_in_the_run_directory(refused, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "3").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(TrainConfig.load(DEMO).to_dict()))
    assert "holds a run of another recipe" in refused("kl_coef=0.5")
    assert f"steps: {run_dir} has done 3 already, more than 2" in refused("steps=2")


def test_a_report_of_no_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["srrl", "report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("srrl: ") and str(tmp_path / "none") in error


def test_ctrl_c_ends_a_command_with_a_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("srrl_jax.evaluation.lines.sample_file", interrupted)
    monkeypatch.setattr(sys, "argv", ["srrl", "sample", "model", "in.jsonl", "out.jsonl"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 130
    assert capsys.readouterr().err.startswith("srrl: interrupted")


def test_an_unexpected_error_is_not_swallowed(monkeypatch):
    from srrl_jax.training import TrainConfig

    def fail(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(TrainConfig, "load", fail)
    monkeypatch.setattr(sys, "argv", ["srrl", "train", str(DEMO)])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()


def test_the_installed_command():
    command = [Path(sys.executable).with_name("srrl"), "train", "configs/demo.yaml", "modle=x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "did you mean 'model'?" in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_jax_starts_with_our_settings_unless_the_user_has_some(tmp_path, given):
    ours = ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    environ |= {"XDG_CACHE_HOME": str(tmp_path)} | (
        dict(zip(ours, (given, "0.5"), strict=True)) if given else {}
    )
    program = """
import os, sys
from srrl_jax import cli
from srrl_jax.options import finite
sys.argv = ["srrl", "--help"]
try:
    cli.main()
except SystemExit:
    import jax
    print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    print(jax.config.jax_compilation_cache_dir)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    *_, fraction, kept = result.stdout.splitlines()
    assert kept == (given or str(tmp_path / "srrl_jax" / "programs"))
    assert fraction == ("0.5" if given else "0.95")
