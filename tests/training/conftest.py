"""Checkpoints and settings that the tests of training share."""

import json
import shutil
from pathlib import Path

import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.run import train
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import TrainConfig
from srrl_jax.training.update import TrainState

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
    "optimizer.microbatch=1",
    "optimizer.warmup_steps=1",
    # Every term of the loss counts, and a step's second update is off its policy.
    "kl_coef=0.1",
    "optimizer.minibatches=2",
    "optimizer.learning_rate=0.001",
    "optimizer.weight_decay=0.1",
    "optimizer.grad_clip=0.5",
]

# Four steps, with held-out rows and checkpoints on the way.
FOUR = (
    "steps=4",
    f"data.eval={WORLD / 'hard.jsonl'}",
    "eval.rows=2",
    "eval.every=2",
    "checkpoint.every=2",
    "checkpoint.keep=5",
)


@pytest.fixture(scope="session")
def recipe():
    """Makes the demo's recipe at a size of seconds, with further overrides: (run_dir, *overrides).

    Whoever keeps to its shapes and its optimizer finds all programs compiled already.
    """

    def make(run_dir, *overrides: str) -> TrainConfig:
        return TrainConfig.load(ROOT / "configs/demo.yaml", [*SMALL, *overrides, f"run_dir={run_dir}"])

    return make


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> tuple[Path, TrainState]:
    """The directory of a whole run of FOUR, to be left as it is, and what was learnt."""
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, train(recipe(run_dir, *FOUR))


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


@pytest.fixture(scope="module")
def places(asked_to_think, tmp_path_factory) -> dict[str, str]:
    """Files that values in the tables of keys stand for."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "template.txt").write_text("hello .\n\n{conversation}\n\nwhat of {criterion}")
    # The embedded network with other weights: the same shapes, so nothing compiles anew.
    model = load_model(WORLD / "checkpoint")
    model.norm.weight[...] = 0.5 * model.norm.weight[...]
    for file in asked_to_think.iterdir():
        (directory / file.name).write_bytes((WORLD / "checkpoint" / file.name).read_bytes())
    save_model(model, directory)
    rest = (WORLD / "easy.jsonl").read_text().splitlines(keepends=True)[:9]
    (directory / "rest.jsonl").write_text("".join(rest))
    asked = [json.dumps(json.loads(line) | {"question": "hello ."}) + "\n" for line in rest]
    (directory / "asked.jsonl").write_text("".join(asked))
    return {
        "rest": str(directory / "rest.jsonl"),
        "asked": str(directory / "asked.jsonl"),
        "thinking": str(asked_to_think),
        "template": str(directory / "template.txt"),
        "random": str(directory),
    }
