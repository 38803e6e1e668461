"""Run by test_sampling_mesh.py in a process with eight virtual devices; prints numbers as JSON."""

import json
import sys

import jax
import numpy as np
from flax import nnx

from srrl_jax.grading.gap import reply_gaps
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.parallel import MeshConfig, make_mesh, shardings
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig

# A dense layer, which 8 bits concern, before one of experts.
CONFIG = Qwen3Config.from_hf(
    {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0],
    }
)  # fmt: skip
random = np.random.default_rng(0)
PREFIXES = [
    [40, 50, 60, *random.integers(0, 512, n)] for n in (9, 14, 5, 16, 11)
]  # alike at first; with this key no expert flips
BRANCHES = [[random.integers(0, 512, n).tolist() for n in (3, 0)] for _ in PREFIXES]
ROWS = [RowLengths(19, [4, 4])] * 8
SHARED = tuple(PREFIXES[0][:3])


def sample(model, mesh):
    """Tokens and log-probabilities of all completions, and the gaps of a prefill to a pass without 8 bits."""
    run = Sampler(
        model, ROWS, new_tokens=8, stop_ids=range(100), sampling=SamplingConfig(0.8), mesh=mesh,
        int8="weights_kv", shared=SHARED,
    )  # fmt: skip
    params = nnx.state(model)
    results = run.generate(params, PREFIXES, BRANCHES, jax.random.key(7))
    completions = [completion for row in results for completion in row]
    gaps = reply_gaps(run, params, PREFIXES, [row[0] for row in BRANCHES], [row[0] for row in results])
    return [c.tokens.tolist() for c in completions], [c.logprobs.tolist() for c in completions], gaps


def main() -> None:
    graphdef, state = nnx.split(Qwen3(CONFIG, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, state)  # far from uniform
    report = {"one": sample(nnx.merge(graphdef, state), None)}
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    with jax.set_mesh(mesh):
        cut = nnx.merge(graphdef, jax.device_put(state, shardings(state, mesh)))
        report["eight"] = sample(cut, mesh)
    json.dump(report, sys.stdout)


main()
