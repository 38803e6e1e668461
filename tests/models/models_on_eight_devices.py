"""Run by test_models_mesh.py in a process with eight virtual devices; prints numbers as JSON."""

import functools
import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.kernels import fused
from srrl_jax.kernels.attention import attend
from srrl_jax.kernels.segment import Segment
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.models import head as head_module
from srrl_jax.parallel import MeshConfig, make_mesh

head_module._TOKENS, head_module._VOCAB = 16, 6
HIDDEN = 8


def run(hidden, head, targets):
    """Values, and gradients of a weighted sum of them."""
    (logprobs, entropy), back = jax.vjp(
        lambda h, w: head_module.token_logprobs(h, w, targets, 0.7, 41), hidden, head
    )
    weight = jnp.cos(jnp.arange(logprobs.size)).reshape(logprobs.shape)
    return logprobs, entropy, *back((weight, 0.3 * weight))


def errors(actual, expected) -> list[float]:
    """Largest difference of each array over its largest value."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [float(np.abs(np.asarray(x) - y).max() / np.abs(y).max()) for x, y in pairs]


def attention(mesh, kernel, rows: int, heads: int, knows_order: bool) -> list[float]:
    """Two branches on a prefix, values and gradients, against plain XLA on one device.

    A kernel that knows the order of tokens is told only which are real: here all.
    """
    keys = jax.random.split(jax.random.key(heads), 5)
    q = jax.random.normal(keys[0], (rows, 2, 6, 2 * heads, 8))
    own = [jax.random.normal(key, (rows, heads, 2, 6, 8)) for key in keys[1:3]]
    prefix = [jax.random.normal(key, (rows, heads, 1, 9, 8)) for key in keys[3:]]
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (rows, 2, 6, 6))

    def run(function, mask, q, own, prefix):
        def out(q, own, prefix):
            segments = [Segment(*prefix, jnp.ones((1, 1, 1, 9), bool)), Segment(*own, mask)]
            return function(q, segments)

        y, back = jax.vjp(out, q, own, prefix)
        return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    expected = jax.jit(functools.partial(run, attend, causal))(q, own, prefix)
    mask = jnp.ones((rows, 2, 1, 6), bool) if knows_order else causal
    with jax.set_mesh(mesh):
        return errors(jax.jit(functools.partial(run, kernel, mask))(q, own, prefix), expected)


EXPERTS = Qwen3Config.from_hf(
    {
        "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0],
    }
)  # fmt: skip


def loaded_experts() -> dict[str, list]:
    """By mesh sizes: the shard of a device, and whether all weights are those that were saved."""
    model = Qwen3(EXPERTS, rngs=nnx.Rngs(0))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory)
        for sizes in ((1, 1, 1, 1, 8), (1, 1, 2, 2, 2), (1, 1, 8, 1, 1)):
            mesh = make_mesh(MeshConfig(*sizes))
            loaded = load_model(directory, mesh=mesh, dtype=jnp.bfloat16)
            pairs = zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(model)), strict=True)
            same = all(np.array_equal(x, y.astype(jnp.bfloat16)) for x, y in pairs)
            shard = loaded.moe_layers.mlp.experts.up_proj.weight[...].addressable_shards[0].data.shape
            found[str(sizes)] = [list(shard), same]
    return found


def main() -> None:
    report = {"experts": loaded_experts()}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    splash = functools.partial(fused.over_mesh, functools.partial(fused.splash, interpret=True))
    cudnn = functools.partial(fused.over_mesh, functools.partial(fused.cudnn, implementation="xla"))
    for name, kernel, rows, heads in (
        ("splash", splash, 4, 2),
        ("splash, whole rows", splash, 3, 2),
        ("splash, whole heads", splash, 4, 3),
        ("cudnn", cudnn, 4, 2),
    ):
        report[name] = {"errors": attention(mesh, kernel, rows, heads, kernel is splash)}
    for name, rows, vocab in (("cut", 8, 44), ("whole vocabulary", 8, 43), ("whole rows", 3, 44)):
        keys = jax.random.split(jax.random.key(rows), 3)
        hidden = jax.random.normal(keys[0], (rows, 3, 5, HIDDEN))
        head = jax.random.normal(keys[1], (vocab, HIDDEN))
        targets = jax.random.randint(keys[2], (rows, 3, 5), 0, 41)
        expected = jax.jit(run)(hidden, head, targets)
        with jax.set_mesh(mesh):
            batch = NamedSharding(mesh, P(("data", "fsdp") if rows == 8 else None))
            weight = NamedSharding(mesh, P("tensor" if vocab == 44 else None, "fsdp"))
            place = (
                jax.device_put(hidden, batch),
                jax.device_put(head, weight),
                jax.device_put(targets, batch),
            )
            program = jax.jit(run, out_shardings=(batch, batch, batch, weight)).lower(*place).compile()
            actual = program(*place)
        gathers = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", program.as_text())
        report[name] = {
            "errors": errors(actual, expected),
            "gathered": sorted({int(np.prod([int(n) for n in shape.split(",")])) for shape in gathers}),
        }
    json.dump(report, sys.stdout)


main()
