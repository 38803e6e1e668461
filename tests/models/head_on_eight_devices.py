"""Run by test_head_mesh.py in a process with eight virtual devices; prints numbers as JSON."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def main() -> None:
    report = {}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
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
            "errors": [
                float(np.abs(np.asarray(x) - y).max() / np.abs(y).max())
                for x, y in zip(actual, expected, strict=True)
            ],
            "gathered": sorted({int(np.prod([int(n) for n in shape.split(",")])) for shape in gathers}),
        }
    json.dump(report, sys.stdout)


main()
