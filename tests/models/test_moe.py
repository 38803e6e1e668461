"""Layers of experts against the plain sum over all experts, and how they treat padding and load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints.names import tensor_names
from srrl_jax.kernels.ragged import outer_products
from srrl_jax.models import Qwen3Config
from srrl_jax.models.moe import MoE, mix_experts
from srrl_jax.models.qwen3 import layer_runs

TOKENS, K, EXPERTS, HIDDEN, INNER = 12, 2, 5, 8, 6


def draw(seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((TOKENS, HIDDEN), np.float32)
    weights = random.random((TOKENS, K), np.float32)
    chosen = np.argsort(random.random((TOKENS, EXPERTS)))[:, :K]
    gate, up = random.standard_normal((2, EXPERTS, INNER, HIDDEN), np.float32)
    down = random.standard_normal((EXPERTS, HIDDEN, INNER), np.float32)
    return x, weights, chosen, gate, up, down


def every_expert(x, weights, chosen, gate, up, down):
    """Each token through each expert, weighted by zero where it has not chosen it."""
    y = jax.nn.silu(jnp.einsum("td,efd->tef", x, gate)) * jnp.einsum("td,efd->tef", x, up)
    share = (jax.nn.one_hot(chosen, len(gate)) * weights[..., None]).sum(1)
    return jnp.einsum("tef,edf,te->td", y, down, share)


@pytest.mark.parametrize("case", ["spread", "all to one", "some to none", "one expert empty"])
def test_mix_equals_the_sum_over_all_experts(case):
    x, weights, chosen, *matrices = draw()
    if case == "all to one":
        chosen[:] = 3
    elif case == "some to none":  # numbers out of range on either side: padding, or another device's
        chosen[2], chosen[5, 1], chosen[7] = EXPERTS, -1, 1000
    elif case == "one expert empty":
        chosen[chosen == 2] = 4

    def both(function):
        def loss(x, weights, *matrices):
            y = function(x, weights, chosen, *matrices)
            return (y**2).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(x, weights, *matrices)

    ((_, actual), gradients), ((_, expected), expected_gradients) = both(mix_experts), both(every_expert)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


FIELDS = {
    "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
}  # fmt: skip


def test_padding_goes_nowhere():
    layer = MoE(Qwen3Config.from_hf(FIELDS), (), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 1, 6, 8), np.float32)
    mask = np.ones((2, 1, 6), bool)
    mask[0, 0, :2] = mask[1, 0, 4:] = False
    y, load = layer(x, mask)
    other = 1e3 * random.standard_normal(x.shape, np.float32)
    again, same = layer(np.where(mask[..., None], x, other), mask)
    alone, _ = layer(x[1:, :, :4], mask[1:, :, :4])
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(np.asarray(y)[~mask], 0)
    np.testing.assert_allclose(y[1, 0, :4], alone[0, 0], rtol=0, atol=1e-6 * np.abs(y).max())
    for one, another in zip(load, same, strict=True):
        np.testing.assert_array_equal(one, another)
    assert load.tokens == mask.sum() and load.chosen.sum() == 2 * mask.sum()
    np.testing.assert_allclose(load.probability.sum(), mask.sum(), rtol=1e-6)


def test_runs_of_layers():
    def seen(has_experts):
        return [(e, (a.start, a.stop), (b.start, b.stop)) for e, a, b in layer_runs(has_experts)]

    assert seen([False] * 3) == [(False, (0, 3), (0, 3))]
    assert seen([True, False, False, True]) == [
        (True, (0, 1), (0, 1)),
        (False, (0, 2), (1, 3)),
        (True, (1, 2), (3, 4)),
    ]


def test_tensor_names():
    config = Qwen3Config.from_hf({**FIELDS, "mlp_only_layers": [0, 3]})
    assert config.has_experts == (False, True, True, False, True)
    assert tensor_names(("embed_tokens", "weight"), config) == {"model.embed_tokens.weight": ()}
    assert tensor_names(("lm_head", "weight"), config) == {"lm_head.weight": ()}
    assert tensor_names(("layers", "mlp", "up_proj", "weight"), config) == {
        "model.layers.0.mlp.up_proj.weight": (0,),
        "model.layers.3.mlp.up_proj.weight": (1,),
    }
    assert tensor_names(("moe_layers", "mlp", "gate", "weight"), config) == {
        "model.layers.1.mlp.gate.weight": (0,),
        "model.layers.2.mlp.gate.weight": (1,),
        "model.layers.4.mlp.gate.weight": (2,),
    }
    experts = tensor_names(("moe_layers", "mlp", "experts", "down_proj", "weight"), config)
    assert len(experts) == 3 * 4
    assert experts["model.layers.4.mlp.experts.3.down_proj.weight"] == (2, 3)


def test_outer_products_of_groups():
    """Groups that begin and end within tiles, are empty, or hold several tiles; NaN beyond the last."""
    sizes, (a, b) = np.array([700, 0, 5, 1100, 1, 0]), (3, 4)
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((2048, n)).astype(np.float32) for n in (a, b))
    parts = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    expected = np.stack([left[part].T @ right[part] for part in parts])
    left[sizes.sum() :] = right[sizes.sum() :] = np.nan
    np.testing.assert_allclose(jax.jit(outer_products)(left, right, jnp.asarray(sizes)), expected, atol=1e-3)
