"""What only a GPU can show: `pytest -m gpu`. `planning/test_gpu.py` compiles for one that is not here."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax import TrainConfig, train
from srrl_jax.checkpoints import load_model
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.sampling import RowLengths, Sampler
from srrl_jax.telemetry import read_jsonl

pytestmark = pytest.mark.gpu
CHECKPOINT = Path(__file__).resolve().parents[1] / "srrl_jax/tinyworld/checkpoint"
SIZES = Qwen3Config(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU that JAX uses; it has a {jax.default_backend()}")


def test_float32_on_the_gpu_is_that_of_the_cpu():
    """Not TF32, whose logits are 1e-3 apart."""
    tokens = np.arange(2, 62).reshape(3, 20)
    with jax.default_matmul_precision("highest"):
        here = np.asarray(jax.jit(Qwen3.__call__)(load_model(CHECKPOINT), tokens))
        with jax.default_device(jax.devices("cpu")[0]):
            there = np.asarray(jax.jit(Qwen3.__call__)(load_model(CHECKPOINT), tokens))
    np.testing.assert_allclose(here, there, rtol=0, atol=2e-5 * np.abs(there).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("given", [0, 5])
def test_the_kernels_of_prefill_and_decode_say_what_the_update_computes(dtype, tolerance, given):
    """Log-probabilities of what was sampled, prompts of 3 to 300 tokens, four branches of each."""
    model, random = Qwen3(SIZES, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)), np.random.default_rng(0)
    prompts = [random.integers(2, 512, size).tolist() for size in (3, 70, 129, 300)]
    branches = [[random.integers(2, 512, given).tolist() for _ in range(4)] for _ in prompts]
    rows = [RowLengths(len(prompt), [given] * 4) for prompt in prompts]
    with jax.default_matmul_precision("highest"):
        sampler = Sampler(model, rows, new_tokens=40, stop_ids=[1])
        groups = sampler.generate(nnx.state(model), prompts, branches, jax.random.key(0))
        compute = jax.jit(branch_logprobs)
        for prompt, row, group in zip(prompts, branches, groups, strict=True):
            for branch, completion in zip(row, group, strict=True):
                prefix, tokens = np.array([[*prompt, *branch]]), completion.tokens
                lengths = np.array([prefix.size]), np.array([[tokens.size]])
                tree = TreeBatch(prefix, lengths[0], tokens[None, None], lengths[1])
                expected, _ = compute(model, tree)
                np.testing.assert_allclose(completion.logprobs, expected[0, 0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_training(tmp_path, dtype):
    overrides = [f"run_dir={tmp_path}", "steps=1", "data.eval=null", "prompts_per_step=4", f"dtype={dtype}"]
    train(TrainConfig.load("demo", overrides))
    (metrics,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert metrics["guard/skipped_updates"] == 0 and np.isfinite(metrics["grad_norm"])
    assert metrics["logprob_diff/mean"] < (1e-5 if dtype == "float32" else 0.02)


_UPDATE = """
import json, sys, jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from srrl_jax import TrainConfig
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.programs import peak_bytes
from srrl_jax.sampling import Completion
from srrl_jax.training.batch import pack_groups, split_batch
from srrl_jax.training.shapes import UpdateShapes
from srrl_jax.training.update import make_optimizer, make_update

sizes = Qwen3Config(vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8,
                    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
graphdef, params = nnx.split(Qwen3(sizes, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
config = TrainConfig.load("demo", ["kl_coef=0", "dtype=bfloat16", "run_dir=unused"])
optimizer = make_optimizer(config.optimizer)
completion = Completion(np.arange(2, 514, dtype=np.int32), np.full(512, -9.0, np.float32), False)
shapes = UpdateShapes(256, (512,), 2)
batch = pack_groups([[5] * 256] * 4, [[completion] * 4] * 4, np.ones((4, 4), bool), shapes)
(part,) = split_batch(batch._replace(advantages=np.ones((4, 4), np.float32)), 1, 2)
update = make_update(graphdef, config, optimizer, sys.argv[1])
state = params, optimizer.init(params)
del params
compiled = update.lower(*state, part).compile()
jax.block_until_ready(compiled(*state, part))
stats = jax.local_devices()[0].memory_stats() or {}
print(json.dumps({"planned": peak_bytes(compiled.memory_analysis()), "peak": stats.get("peak_bytes_in_use")}))
"""


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_update_takes_the_memory_that_the_plan_says(remat):
    command = [sys.executable, "-c", _UPDATE, remat]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0.8 < found["peak"] / found["planned"] < 1.2, found
