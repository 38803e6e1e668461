"""Attention of long sequences, a block of queries at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.kernels import attention
from srrl_jax.kernels.attention import attend, attend_causal
from srrl_jax.kernels.segment import Segment


def inputs(tokens, context, own_row_masks, seed=0):
    """Queries of 2 rows of 2 branches of 4 heads, and their context and own segment."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    q, k, v = normal(2, 2, tokens, 4, 8), normal(2, 2, 2, tokens, 8), normal(2, 2, 2, tokens, 8)
    rows = tokens if own_row_masks else 1
    before = Segment(
        normal(2, 2, 1, context, 8), normal(2, 2, 1, context, 8), random.random((2, 1, rows, context)) < 0.7
    )
    steps = np.arange(tokens)
    real = random.random((2, 2, 1, tokens)) < 0.8
    return q, before, Segment(k, v, real & (steps[:, None] >= steps))


@pytest.mark.parametrize("own_row_masks", [False, True])
def test_blocks_equal_the_whole(monkeypatch, own_row_masks):
    q, before, own = inputs(11, 5, own_row_masks)
    expected = attend(q, [before, own])
    monkeypatch.setattr(attention, "BLOCK", 4)

    def whole(q, k):
        return (attend(q, [before, own._replace(k=k)]) ** 2).sum()

    def blocks(q, k):
        return (attend_causal(q, [before], own._replace(k=k)) ** 2).sum()

    np.testing.assert_allclose(attend_causal(q, [before], own), expected, rtol=0, atol=1e-6)
    gradients = zip(
        jax.jit(jax.grad(blocks, (0, 1)))(q, own.k), jax.jit(jax.grad(whole, (0, 1)))(q, own.k), strict=True
    )
    for actual, other in gradients:
        np.testing.assert_allclose(actual, other, rtol=0, atol=1e-5)


def test_memory_of_scores_is_bounded():
    """Of 2 x 2 x 4 heads with 1,024 queries and keys: less than one of the many copies of all scores."""
    arguments = inputs(1024, 8, False)
    program = jax.jit(lambda q, before, own: attend_causal(q, [before], own)).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 16 * 1024 * 1024 * 4
