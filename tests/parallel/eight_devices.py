"""Run by test_mesh.py in a process with eight virtual devices; prints numbers as JSON.

Usage: python eight_devices.py CHECKPOINT_DIRECTORY
"""

import json
import math
import re
import sys

import jax
import numpy as np
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.parallel import MeshConfig, make_mesh, place_batch, shardings
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig

random = np.random.default_rng(0)
PREFIXES = [random.integers(0, 512, n).tolist() for n in (9, 14, 5, 16, 11)]
BRANCHES = [[random.integers(0, 512, n).tolist() for n in (3, 0)] for _ in PREFIXES]
ROWS = [RowLengths(16, [4, 4])] * 4
TREE = TreeBatch(
    random.integers(0, 512, (8, 12)),
    np.array([12, 7, 3, 10] * 2),
    random.integers(0, 512, (8, 2, 6)),
    np.array([[6, 2], [1, 5], [4, 4], [3, 6]] * 2),
)

EXPERTS = Qwen3Config.from_hf(
    {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "mlp_only_layers": [0],
    }
)  # fmt: skip


def make(model, mesh) -> Sampler:
    return Sampler(
        model,
        ROWS,
        new_tokens=8,
        stop_ids=range(0, 512, 10),
        sampling=SamplingConfig(0.8, top_k=50),
        mesh=mesh,
    )


def sample(model, mesh):
    """Tokens and log-probabilities of all completions."""
    run = make(model, mesh)
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


def between_slices(text: str) -> list[str]:
    """The collectives of a program whose groups have devices of both halves: kind and result."""
    kinds = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    lines = [(match, match.string) for line in text.splitlines() if (match := re.search(kinds, line))]
    crosses = [any(min(group) < 4 <= max(group) for group in groups(line)) for _, line in lines]
    return [f"{match[2]} {match[1]}" for (match, _), both in zip(lines, crosses, strict=True) if both]


def groups(line: str) -> list[list[int]]:
    """Of a collective, in any of the ways that XLA writes them."""

    def devices(sizes: str, axes: str | None) -> np.ndarray:
        return np.arange(8).reshape(numbers(sizes)).transpose(numbers(axes) if axes else None)

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text)]

    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [numbers(group) for group in found[1].split("},")]
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", line):
        return devices(found[2], found[3]).reshape(numbers(found[1])).tolist()
    found = re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({order}\))? \{{(.*?)\}}", line)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    mesh = devices(found[2] or "8", found[3]).reshape([int(size) for size in sizes.values()])
    along = [place for place, axis in enumerate(sizes) if f"'{axis}'" in found[4]]
    size = math.prod(mesh.shape[place] for place in along)
    return np.moveaxis(mesh, along, range(-len(along), 0)).reshape(-1, size).tolist()


def main(folder: str) -> None:
    alone = load_model(folder)
    mesh = make_mesh(MeshConfig(slice=2, fsdp=2, tensor=2))
    report = {"devices": jax.device_count(), "one": sample(alone, None)}
    with jax.set_mesh(mesh):
        cut = load_model(folder, mesh=mesh)
        report["mesh"] = sample(cut, mesh)
        programs = make(cut, mesh).programs(nnx.state(cut))
        texts = {program.kind: program.lower().compile().as_text() for program in programs}
        program = gradient.lower(cut, place_batch(TREE, mesh)).compile()
        cut_gradient = program(cut, place_batch(TREE, mesh))
    texts["gradient"] = program.as_text()
    report["between_slices"] = {name: between_slices(text) for name, text in texts.items()}
    report["within_slices"] = {name: " all-" in text for name, text in texts.items()}
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
    alone = nnx.merge(graphdef, state)
    # `tensor` cuts experts and tokens; nothing; the prefix's tokens alone; and 6 rows are cut by nothing.
    meshes = ((1, 1, 1, 2, 4), 8), ((2, 1, 2, 1, 2), 8), ((1, 1, 1, 4, 2), 8), ((1, 1, 2, 1, 4), 6)
    for sizes, rows in meshes:
        mesh, tree = make_mesh(MeshConfig(*sizes)), jax.tree.map(lambda x, rows=rows: x[:rows], TREE)
        expected = gradient(alone, tree)
        with jax.set_mesh(mesh):
            cut = nnx.merge(graphdef, jax.device_put(state, shardings(state, mesh)))
            cut_gradient = gradient(cut, place_batch(tree, mesh) if rows == 8 else tree)
        up = cut.moe_layers.mlp.experts.up_proj.weight[...]
        report["experts"][str(sizes)] = {
            "shard": list(up.addressable_shards[0].data.shape),
            "gradient_errors": errors(cut_gradient, expected),
        }
    try:
        shardings(state, make_mesh(MeshConfig(fsdp=1, expert=8)))
    except InputError as error:
        report["experts_error"] = str(error)
    print(json.dumps(report))


main(sys.argv[1])
