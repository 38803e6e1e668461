"""Run by test_mesh.py in a process with eight virtual devices; prints numbers as JSON.

Usage: python eight_devices.py CHECKPOINT_DIRECTORY
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.parallel import MeshConfig, make_mesh, place_batch, shardings
from srrl_jax.sampling import Buckets, Sampler, SamplingConfig

random = np.random.default_rng(0)
PREFIXES = [random.integers(0, 512, n).tolist() for n in (9, 14, 5, 16, 11)]
BRANCHES = [[random.integers(0, 512, n).tolist() for n in (3, 0)] for _ in PREFIXES]
TABLE = Buckets(prefix=(16,), branch=(4,), fan_out=(2,), rows=(4,))
TREE = TreeBatch(
    random.integers(0, 512, (4, 12)),
    np.array([12, 7, 3, 10]),
    random.integers(0, 512, (4, 2, 6)),
    np.array([[6, 2], [1, 5], [4, 4], [3, 6]]),
)

EXPERTS = Qwen3Config.from_hf(
    {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0],
    }
)  # fmt: skip


def sample(model, mesh):
    """Tokens and log-probabilities of all completions."""
    run = Sampler(
        model, TABLE, new_tokens=8, stop_ids=(456, 319), sampling=SamplingConfig(0.8, top_k=50), mesh=mesh
    )
    results = run.generate(nnx.state(model), PREFIXES, BRANCHES, jax.random.key(3))
    completions = [completion for row in results for completion in row]
    return [c.tokens.tolist() for c in completions], [c.logprobs.tolist() for c in completions]


@jax.jit
def gradient(model, tree):
    mask = np.arange(6) < tree.branch_lengths[..., None]

    def loss(model):
        logprobs, entropy = branch_logprobs(model, tree, 0.8, remat="full")
        return ((logprobs + 0.1 * entropy) * mask).sum() / mask.sum()

    return nnx.state(nnx.grad(loss)(model))


def errors(actual, expected) -> dict[str, float]:
    """Relative, of every parameter."""
    return {
        ".".join(path): float(np.linalg.norm(x[...] - y[...]) / np.linalg.norm(y[...]))
        for (path, x), (_, y) in zip(
            nnx.to_flat_state(jax.device_get(actual)),
            nnx.to_flat_state(jax.device_get(expected)),
            strict=True,
        )
    }


def main(folder: str) -> None:
    alone = Qwen3.from_pretrained(folder)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    report = {"devices": jax.device_count(), "one": sample(alone, None)}
    with jax.set_mesh(mesh):
        cut = Qwen3.from_pretrained(folder, mesh=mesh)
        report["mesh"] = sample(cut, mesh)
        cut_gradient = gradient(cut, place_batch(TREE, mesh))
    report["shapes"] = {
        ".".join(path): [list(x[...].shape), list(x[...].addressable_shards[0].data.shape)]
        for path, x in nnx.to_flat_state(nnx.state(cut))
    }
    expected = gradient(alone, TREE)
    report["gradient_errors"] = errors(cut_gradient, expected)
    report["experts"] = {}
    alone = Qwen3(EXPERTS, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(
        jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, alone)
    )  # matrices of layers
    alone, expected = nnx.merge(graphdef, state), gradient(nnx.merge(graphdef, state), TREE)
    for sizes in ((1, 1, 2, 4), (1, 2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        with jax.set_mesh(mesh):
            cut = nnx.merge(graphdef, jax.device_put(state, shardings(state, mesh)))
            cut_gradient = gradient(cut, place_batch(TREE, mesh))
        up = cut.moe_layers.mlp.experts.up_proj.weight[...]
        report["experts"][str(sizes)] = {
            "shard": list(up.addressable_shards[0].data.shape),
            "gradient_errors": errors(cut_gradient, expected),
        }
    try:
        shardings(state, make_mesh(MeshConfig(fsdp=1, expert=8)))
    except InputError as error:
        report["experts_error"] = str(error)
    try:
        Sampler(cut, Buckets(prefix=(16,), fan_out=(1,), rows=(4, 6)), new_tokens=1, stop_ids=(), mesh=mesh)
    except InputError as error:
        report["rows_error"] = str(error)
    print(json.dumps(report))


main(sys.argv[1])
