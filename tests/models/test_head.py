"""The chunked unembedding against the naive one: values, gradients, and what is never stored."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.models.head import token_logprobs

VOCAB, HIDDEN = 17, 8


def naive(hidden, head, targets, temperature):
    logprobs = jax.nn.log_softmax(hidden @ head.T / temperature)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)


def inputs(n, b, t, vocab=VOCAB, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(n + b + t), 3)
    hidden = 2 * jax.random.normal(keys[0], (n, b, t, HIDDEN), dtype)
    head = jax.random.normal(keys[1], (vocab, HIDDEN))
    return hidden, head, jax.random.randint(keys[2], (n, b, t), 0, vocab)


def gradients(function, hidden, head, targets, temperature):
    def total(hidden, head):
        logprobs, entropy = function(hidden, head, targets, temperature)
        weight = jnp.cos(jnp.arange(logprobs.size)).reshape(logprobs.shape)
        return (weight * (logprobs + 0.3 * entropy)).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)


# One chunk; a last chunk that is padded (1,024 = 6 x 170 + 4); more rows than a chunk holds.
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 401), (1, 1, 1025), (1030, 1, 2)])
def test_equals_naive(sizes):
    args = (*inputs(*sizes), 0.6)
    actual, expected = jax.jit(token_logprobs)(*args), jax.jit(naive)(*args)
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == sizes and x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_naive(temperature):
    args = (*inputs(2, 3, 401), temperature)
    for x, y in zip(gradients(token_logprobs, *args), gradients(naive, *args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def test_large_logits_are_finite():
    hidden, head, targets = inputs(1, 2, 9)
    logprobs, entropy = jax.jit(token_logprobs)(1000 * hidden, head, targets)
    assert np.isfinite(logprobs).all() and np.isfinite(entropy).all()
    to_hidden, to_head = gradients(token_logprobs, 1000 * hidden, head, targets, 1.0)
    assert np.isfinite(to_hidden).all() and np.isfinite(to_head).all()


def test_head_gradient_of_bfloat16_states_adds_up_in_float32():
    """64 chunks whose gradients are alike: a bfloat16 sum would stop growing."""
    hidden, head, targets = inputs(64, 16, 64, dtype=jnp.bfloat16)
    hidden = jnp.abs(hidden)
    targets = targets % 3
    actual = gradients(token_logprobs, hidden, head, targets, 1.0)[1]
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = gradients(naive, hidden.astype(jnp.float32), rounded, targets, 1.0)[1]
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < 5e-3


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program and its inner programs name."""
    sizes = [v.aval.size for v in (*jaxpr.invars, *jaxpr.outvars) if hasattr(v.aval, "size")]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        sizes += [largest_array(inner) for inner in jex.jaxprs_in_params(equation.params)]
    return max(sizes, default=0)


def test_logits_never_exist_at_once():
    tokens, vocab = 65536, 1000
    shapes = (
        jax.ShapeDtypeStruct((1, 2, tokens // 2, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((vocab, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, tokens // 2), jnp.int32),
    )

    def program(function):
        def total(hidden, head, targets):
            return sum(x.sum() for x in function(hidden, head, targets, 1.0))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))

    chunk, whole = 1024 * vocab, tokens * vocab
    jaxpr = jax.make_jaxpr(program(token_logprobs))(*shapes).jaxpr
    assert largest_array(jaxpr) == chunk
    assert largest_array(jax.make_jaxpr(program(naive))(*shapes).jaxpr) == whole

    def temporary(function):
        return program(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    # In bytes, with 64 chunks: a few chunks' logits, a few copies of all of them.
    assert temporary(token_logprobs) < 6 * 4 * chunk
    assert temporary(naive) > 2 * 4 * whole
