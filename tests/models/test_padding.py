"""Padding whose embedding is zero, as transformers writes the pad token's row.

RMSNorm multiplies the gradient at a zero vector by 1 / sqrt(eps), a thousand: padding must not reach
the loss in either direction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.models import TreeBatch, branch_logprobs

PAD = 5


@jax.jit
def gradient_of(model, tree):
    """Of the branches' log-probabilities and entropies, summed."""

    def loss(model):
        logprobs, entropy = branch_logprobs(model, tree)
        inside = jnp.arange(tree.branches.shape[-1]) < tree.branch_lengths[..., None]
        return jnp.where(inside, logprobs - 0.1 * entropy, 0.0).sum()

    return nnx.grad(loss)(model)


def pack(prefixes, branches, prefix_size, branch_size, fan_out, rows, pad=PAD):
    tree = TreeBatch(
        np.full((rows, prefix_size), pad), np.ones(rows, int),
        np.full((rows, fan_out, branch_size), pad), np.zeros((rows, fan_out), int),
    )  # fmt: skip
    for n, (prefix, row) in enumerate(zip(prefixes, branches, strict=True)):
        tree.prefix[n, : len(prefix)], tree.prefix_lengths[n] = prefix, len(prefix)
        for b, branch in enumerate(row):
            tree.branches[n, b, : len(branch)], tree.branch_lengths[n, b] = branch, len(branch)
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture
def model(tiny):
    model = tiny()
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...].at[PAD].set(0.0)
    return model


def test_gradient_with_padding_is_the_gradient_without(model):
    """Prefixes and branches padded in length, rows and branches padded in number."""
    random = np.random.default_rng(0)
    tokens = [t for t in range(96) if t != PAD]
    prefixes = [random.choice(tokens, 5) for _ in range(2)]
    branches = [[random.choice(tokens, 3) for _ in range(2)] for _ in range(2)]
    padded, other = (gradient_of(model, pack(prefixes, branches, 10, 8, 3, 4, pad=pad)) for pad in (PAD, 50))
    expected = gradient_of(model, pack(prefixes, branches, 5, 3, 2, 2))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for actual in (padded, other):
        for leaf, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert jnp.isfinite(leaf).all()
            np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * largest)
    np.testing.assert_array_equal(padded.embed_tokens.weight[PAD], 0.0)


def test_the_gradient_at_a_zero_row_is_huge(model):
    """What the test above guards against: a pad token that counts."""
    prefixes, branches = [[7, 4, PAD, 9, 6]] * 2, [[[8, 3, 6]] * 2] * 2
    rows = np.abs(gradient_of(model, pack(prefixes, branches, 5, 3, 2, 2)).embed_tokens.weight[...]).max(-1)
    assert rows[PAD] > 30 * rows[[7, 9, 8, 4, 3, 6]].max()
