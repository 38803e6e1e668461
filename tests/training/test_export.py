"""A checkpoint of a run as a directory that transformers loads."""

import base64
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from huggingface_hub import constants

from srrl_jax import cli
from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.run.checkpoint import Checkpoints, Position
from srrl_jax.run.checks import write_config
from srrl_jax.run.export import export, exported
from srrl_jax.telemetry import RunLog
from srrl_jax.training.update import TrainState, make_optimizer


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A run directory with checkpoints of steps 2 and 4, and the weights of each."""
    run_dir = tmp_path_factory.mktemp("run")
    config = recipe(run_dir, "checkpoint.keep=5")
    write_config(config, {"rows": "their hash"})
    start, optimizer = nnx.state(load_model(config.model)), make_optimizer(config.optimizer)
    params = {step: jax.tree.map(lambda x, step=step: x * (1 + step / 10), start) for step in (2, 4)}
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        for step, weights in params.items():
            checkpoints.save(Position(step, 0, step), TrainState(weights, optimizer.init(weights)), {})
    log = RunLog(run_dir)
    for step in range(5):
        log.write(step, {"eval/self": step / 10, "reward/mean": None if step == 0 else step / 8})
    for step in (2, 3):
        log.event(step, "warning", f"the judges\npart at {step}")
    return run_dir, params


def assert_holds(out, params):
    leaves = jax.tree.leaves(nnx.state(load_model(out)))
    for left, right in zip(leaves, jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_newest_step_or_the_one_asked_for(run, tmp_path):
    run_dir, params = run
    assert export(run_dir, tmp_path / "newest") == 4
    assert export(run_dir, tmp_path / "second", step=2) == 2
    assert_holds(tmp_path / "newest", params[4])
    assert_holds(tmp_path / "second", params[2])
    assert load_tokenizer(tmp_path / "newest").decode([300]) != ""


def test_the_command(run, tmp_path, monkeypatch, capsys):
    run_dir, params = run
    out = tmp_path / "out"
    for step, options in ((4, []), (2, ["--step", "2"])):
        command = ["srrl", "export", str(run_dir), str(out / str(step)), "--dtype", "bfloat16", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code and capsys.readouterr().out == f"step {step}: {out / str(step)}\n"
        rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params[step])
        assert_holds(out / str(step), rounded)


def test_what_is_refused(run, tmp_path, recipe):
    run_dir, _ = run
    with pytest.raises(InputError, match="no checkpoint of step 3; there are 2, 4"):
        export(run_dir, tmp_path / "out", step=3)
    with pytest.raises(InputError, match=f"{tmp_path}: no run is there"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match=f"{taken}: exists and is not an empty directory"):
            export(run_dir, taken)
    write_config(recipe(tmp_path / "young"))
    with pytest.raises(InputError, match="no checkpoint yet"):
        export(tmp_path / "young", tmp_path / "out")
    with pytest.raises(InputError, match=r"learnt all weights \(lora.rank is 0\); export without --adapter"):
        export(run_dir, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


def test_the_files_are_what_serving_engines_look_for(run, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    export(run[0], tmp_path / "out", dtype="bfloat16")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["Qwen3ForCausalLM"] and str(config.dtype).endswith("bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) <= config.vocab_size
    turns = [{"role": "user", "content": "hello"}]
    ours = load_tokenizer(tmp_path / "out")
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == str(ours.render(turns, thinking=False)) and text
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == list(ours.stop_ids)
    assert max(ours.stop_ids) < config.vocab_size


def card(directory):
    """Front matter and text of a model card."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_model_card_tells_what_was_known_at_the_step(run, tmp_path):
    run_dir, _ = run
    export(run_dir, tmp_path / "second", step=2)
    export(run_dir, tmp_path / "fourth")
    front, text = card(tmp_path / "second")
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a directory is no hub id
    assert "| held-out rows, graded by the model itself | 0 | 0.20 |" in text
    assert (
        "given" not in text
        and "reward that the model gave its own answers to training prompts | 0.12 | 0.25" in text
    )
    assert "warned at step 2: the judges part at 2\n" in text and "part at 3" not in text
    assert "| 0 | 0.40 |" in card(tmp_path / "fourth")[1] and "part at 3" in card(tmp_path / "fourth")[1]
    assert "Training rows: `easy.jsonl`" in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["kl_coef"] == yaml.safe_load((run_dir / "config.yaml").read_text())["kl_coef"]
    assert recipe["model"] == "checkpoint" and str(run_dir) not in text


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback that takes owner/name from who has its token; yields what was committed."""
    files, asked = {}, []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers.get("Authorization")))
            if self.headers.get("Authorization") != "Bearer hf_right":
                return self._answer(401, {"error": "Invalid credentials"})
            if self.path == "/api/repos/create":
                asked.append(json.loads(body))
                return self._answer(200, {"url": f"{constants.ENDPOINT}/owner/name"})
            if "/preupload/" in self.path:
                wanted = json.loads(body)["files"]
                regular = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted
                ]
                return self._answer(200, {"files": regular})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._answer(
                    200,
                    {
                        "success": True,
                        "commitOid": "0" * 40,
                        "commitUrl": f"{constants.ENDPOINT}/owner/name/commit/{'0' * 40}",
                    },
                )
            self._answer(200, {})

        def do_GET(self):
            there = self.path == "/api/models/owner/others"
            about = {"id": "owner/others", "sha": "0" * 40, "siblings": []}
            self._answer(200, about) if there else self._answer(404, {"error": "Repository not found"})

        def log_message(self, *_):
            """Says nothing."""

        def _answer(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield files, asked
    server.shutdown()


def test_an_export_is_pushed_to_a_hub(run, tmp_path, hub):
    files, asked = hub
    export(run[0], tmp_path / "out", push="owner/name")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "generation_config.json"} <= files.keys()
    assert asked[1]["visibility"] == "private"


def test_a_hub_that_takes_nothing_is_told_before_anything_is_written(run, tmp_path, hub, bucket, monkeypatch):
    for name, token in (("owner/name", "hf_wrong"), ("no name", "hf_right")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError, match=rf"--push {name}: (?s:.*)hf auth login"):
            export(run[0], tmp_path / "out", push=name)
    with pytest.raises(InputError, match="--push uploads from a disk"):
        export(run[0], bucket / "out", push="owner/name")
    assert not (tmp_path / "out").exists() and not hub[0]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"Invalid credentials(?s:.*)`hf upload owner/others .*` is enough"):
        export(run[0], tmp_path / "out", push="owner/others")  # it is there, and not to be written to
    assert (tmp_path / "out" / "model.safetensors").exists() and not hub[0]


def test_a_run_directory_stands_for_its_policy(run):
    run_dir, params = run
    assert exported(f"{run_dir}@2") == str(run_dir / "export" / "2")
    assert exported(str(run_dir)) == exported(f"{run_dir}@4") == str(run_dir / "export" / "4")
    assert_holds(run_dir / "export" / "2", params[2])
    assert_holds(run_dir / "export" / "4", params[4])
    left = {path.name for path in run_dir.iterdir() if path.suffix != ".jsonl"}
    assert left == {"config.yaml", "checkpoints", "export"}
    for other in ("owner/name", "policy", str(run_dir / "export" / "4"), "name@2"):
        assert exported(other) == other
    with pytest.raises(InputError, match="no checkpoint of step 3; there are 2, 4"):
        exported(f"{run_dir}@3")
