"""The formulas against the compiler's own count, where it counts right: one layer, no loop."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from srrl_jax.models import Qwen3, Qwen3Config, counts
from srrl_jax.models.counts import Tree
from srrl_jax.models.presets import PRESETS
from srrl_jax.models.tree import TreeBatch, extend_branches, extend_prefix

CONFIG = Qwen3Config(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
TREE = Tree(2, 64, 3, 32)


def abstract():
    return nnx.eval_shape(lambda: Qwen3(CONFIG, rngs=nnx.Rngs(0)))


def batch(tree):
    shapes = TreeBatch((tree.n, tree.p), (tree.n,), (tree.n, tree.b, tree.l), (tree.n, tree.b))
    return TreeBatch(*[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes])


def flops(function, *args) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_forward():
    graphdef, state = nnx.split(abstract())

    def states_and_logits(state, tree):
        model = nnx.merge(graphdef, state)
        last, context, _ = extend_prefix(model, tree)
        hidden, _, _ = extend_branches(model, tree, context)
        return model.logits(hidden[:, :, -1]), hidden, last

    formula = counts.forward(CONFIG, TREE, 4, causal=False).flops + counts.head(CONFIG, 6, 4).flops
    counted = flops(states_and_logits, state, batch(TREE))
    assert formula == pytest.approx(counted, rel=0.05) and formula < counted, "norms and softmax are left out"


def test_weights_are_those_of_the_model():
    state = nnx.state(abstract())
    matrices = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1 and min(x.shape[-2:]) > 1)
    assert counts.parameters(CONFIG) == matrices


@pytest.mark.parametrize(
    ("name", "total", "met"),
    [("qwen3-32b", 32.8, 32.8), ("qwen3-8b", 8.2, 8.2), ("qwen3-30b-a3b", 30.5, 3.3)],
)
def test_published_sizes(name, total, met):
    """Billions of the model cards; those that a token meets count both embeddings."""
    c = PRESETS[name]
    embeddings = counts.parameters(c) - counts.stored_weights(c)
    assert counts.parameters(c) / 1e9 == pytest.approx(total, rel=0.01)
    assert (counts.layer_weights(c) + embeddings) / 1e9 == pytest.approx(met, rel=0.02)


def test_a_decode_step_of_many_tokens_meets_all_experts():
    c = PRESETS["qwen3-30b-a3b"]
    one, many = (counts.decode_step(c, Tree(n, 128, 1, 128), 2).weights for n in (1, 512))
    head = 2 * c.vocab_size * c.hidden_size
    assert one - head == pytest.approx(2 * counts.layer_weights(c))
    assert many - head == pytest.approx(2 * counts.stored_weights(c), rel=1e-3)
