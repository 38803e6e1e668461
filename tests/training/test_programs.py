"""How many programs a real run compiles."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import save_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.parallel import make_mesh
from srrl_jax.run.checks import run_programs
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import make_actor
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.tasks import load_tasks

COPIES = ("relayout", "empty caches", "weights in bfloat16")  # which compile in well under a second


@pytest.fixture(scope="module")
def checkpoint(shared_data, tmp_path_factory):
    """A network of two narrow layers with a real tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for file in (shared_data / "qwen3-tokenizer").iterdir():
        shutil.copy(file, folder)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=40960,
    )
    save_model(Qwen3(config, rngs=nnx.Rngs(0)), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": 151645}))
    return folder


@pytest.mark.slow
def test_default_yaml_on_real_rows_needs_at_most_12_programs(checkpoint, shared_data, monkeypatch):
    """All of them planned from the rows before the first step: whatever an epoch draws, they hold it."""
    rows = shared_data / "healthbench" / "main.jsonl"
    config = TrainConfig.load("configs/default.yaml", [f"model={checkpoint}", f"data.train={rows}"])
    tokenizer = load_tokenizer(config.model)
    tasks = load_tasks(config, tokenizer)
    assert len(tasks.train) == 400
    mesh, lengths = make_mesh(config.mesh), tasks.lengths(config)
    with jax.set_mesh(mesh):
        model = build_model(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        learner = Learner(model, config, mesh, lengths.longest_prompt)
        programs = run_programs(config, actor, learner, learner.init_state())
    names = [program.name for program in programs]
    assert len(set(names)) == len(names)
    assert len([name for name in names if not name.endswith(COPIES)]) <= 12, names
    longest = np.array([max(lengths.grading, key=lambda row: row.tokens).tokens])
    assert actor.grader.sampler.shapes.row >= longest - len(lengths.shared)
