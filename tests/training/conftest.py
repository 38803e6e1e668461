"""Checkpoints and settings that the tests of training share."""

import json
import shutil
from pathlib import Path

import pytest
from flax import nnx

from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "srrl_jax" / "tinyworld"

SMALL = [
    f"model={WORLD / 'checkpoint'}",
    f"data.train={WORLD / 'easy.jsonl'}",
    "data.eval=null",
    f"grading.template={WORLD / 'grader.txt'}",
    "steps=2",
    "prompts_per_step=2",
    "group_size=2",
    "rollout.rows=[4]",
    "grading.rows=[4]",
    "optimizer.microbatch=1",
    "optimizer.warmup_steps=1",
]


@pytest.fixture(scope="session")
def recipe():
    """Makes the demo's recipe at a size of seconds, with further overrides: (run_dir, *overrides)."""

    def make(run_dir, *overrides: str) -> TrainConfig:
        return TrainConfig.load(ROOT / "configs/demo.yaml", [*SMALL, *overrides, f"run_dir={run_dir}"])

    return make


@pytest.fixture(scope="session")
def tiny() -> tuple[nnx.GraphDef, nnx.State, Qwen3]:
    """Structure, random weights and module of a network of one layer."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    return *nnx.split(model), model


@pytest.fixture(scope="session")
def asked_to_think(tmp_path_factory) -> Path:
    """The embedded checkpoint with a chat template that heeds `enable_thinking`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    for file in (WORLD / "checkpoint").iterdir():
        shutil.copy(file, directory)
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["chat_template"] += "{%- if enable_thinking -%}.{%- endif -%}"
    path.write_text(json.dumps(fields))
    return directory


@pytest.fixture(scope="session")
def logs():
    """Reads what two equal runs must agree on to the bit: metrics and samples."""

    def read(run_dir) -> tuple[list[dict], list[dict]]:
        return read_jsonl(Path(run_dir) / "metrics.jsonl"), read_jsonl(Path(run_dir) / "samples.jsonl")

    return read
