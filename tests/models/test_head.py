"""The chunked unembedding against the naive one: values, gradients, and what is never stored."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.models import head as head_module
from srrl_jax.models.head import token_logprobs

VOCAB, HIDDEN = 17, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that tiny inputs take several chunks of each kind, the last ones not full."""
    monkeypatch.setattr(head_module, "_TOKENS", 64)
    monkeypatch.setattr(head_module, "_VOCAB", 6)


def naive(hidden, head, targets, temperature=1.0, allowed=None):
    logits = hidden @ head.T / temperature
    logits = jnp.where(jnp.arange(len(head)) < (allowed or len(head)), logits, -1e30)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    probs = jnp.exp(logprobs)
    return chosen, -jnp.where(probs > 0, probs * logprobs, 0.0).sum(-1)


def inputs(n, b, t, vocab=VOCAB, dtype=jnp.float32, allowed=None):
    keys = jax.random.split(jax.random.key(n + b + t), 3)
    hidden = 2 * jax.random.normal(keys[0], (n, b, t, HIDDEN), dtype)
    head = jax.random.normal(keys[1], (vocab, HIDDEN))
    return hidden, head, jax.random.randint(keys[2], (n, b, t), 0, allowed or vocab)


def everything(function, hidden, head, targets, *options):
    """Log-probabilities, entropies, and gradients by hidden and head of a weighted sum of both."""

    @jax.jit
    def run(hidden, head):
        (logprobs, entropy), back = jax.vjp(lambda h, w: function(h, w, targets, *options), hidden, head)
        weight = jnp.cos(jnp.arange(logprobs.size)).reshape(logprobs.shape)
        return logprobs, entropy, *back((weight, 0.3 * jnp.roll(weight, 1)))

    return run(hidden, head)


def assert_close(actual, expected):
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert x.shape == y.shape and x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-6)
    for x, y in zip(actual[2:], expected[2:], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6 * max(1.0, np.abs(y).max()))


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(2, 40),
    st.sampled_from([0.6, 1.0, 1.7]), st.floats(0.1, 1.0),
)  # fmt: skip
@settings(max_examples=5, deadline=None, derandomize=True)
def test_values_and_gradients_equal_naive(n, b, t, vocab, temperature, share):
    allowed = max(1, int(share * vocab))
    args = (*inputs(n, b, t, vocab, allowed=allowed), temperature, allowed)
    assert_close(everything(token_logprobs, *args), everything(naive, *args))


# One token; more rows than a chunk holds; one chunk of the vocabulary.
@pytest.mark.parametrize("sizes", [(1, 1, 1, VOCAB), (130, 1, 2, VOCAB), (2, 3, 41, 5)])
def test_edges_equal_naive(sizes):
    args = inputs(*sizes)
    assert_close(everything(token_logprobs, *args), everything(naive, *args))


def test_what_is_not_allowed_has_no_probability_and_no_gradient():
    args = (*inputs(2, 3, 4, allowed=7), 0.8, 7)
    *_, to_head = everything(token_logprobs, *args)
    assert (np.asarray(to_head[7:]) == 0).all() and (np.abs(to_head[:7]).max(-1) > 0).all()
    hidden, head, targets, *options = args
    assert_close(everything(token_logprobs, *args), everything(naive, hidden, head, targets, *options))


def test_a_tied_head_gathers_both_gradients():
    _, head, targets = inputs(2, 3, 9)

    def total(function, head):
        hidden = jnp.tanh(head[targets])  # the embedding
        return sum(x.sum() for x in function(hidden, head, jnp.roll(targets, 1)))

    actual, expected = (jax.jit(jax.grad(lambda w, f=f: total(f, w)))(head) for f in (token_logprobs, naive))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_large_logits_are_finite():
    hidden, head, targets = inputs(1, 2, 9)
    results = everything(token_logprobs, 1000 * hidden, head, targets)
    assert all(np.isfinite(x).all() for x in results)


def test_bfloat16_states():
    """Against the naive head on the same rounded numbers in float32; 64 chunks whose gradients are alike,
    where a bfloat16 sum would stop growing."""
    hidden, head, targets = inputs(64, 16, 4, dtype=jnp.bfloat16)
    hidden, targets = jnp.abs(hidden), targets % 3
    actual = everything(token_logprobs, hidden, head, targets)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = everything(naive, hidden.astype(jnp.float32), rounded, targets)
    assert [x.dtype for x in actual] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    for x, y, tolerance in zip(actual, expected, (1e-5, 1e-5, 5e-3, 3e-3), strict=True):
        error = np.linalg.norm(x.astype(jnp.float32) - y) / np.linalg.norm(y)
        assert error < tolerance


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program and its inner programs name."""
    sizes = [v.aval.size for v in (*jaxpr.invars, *jaxpr.outvars) if hasattr(v.aval, "size")]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        sizes += [largest_array(inner) for inner in jex.jaxprs_in_params(equation.params)]
    return max(sizes, default=0)


def test_logits_never_exist_at_once():
    tokens, vocab = 8192, 1000
    shapes = (
        jax.ShapeDtypeStruct((1, 2, tokens // 2, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((vocab, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, tokens // 2), jnp.int32),
    )

    def total(function):
        return lambda *args: sum(x.sum() for x in function(*args))

    def with_gradient(function):
        return jax.jit(jax.value_and_grad(total(function), argnums=(0, 1)))

    def largest(program):
        return largest_array(jax.make_jaxpr(program)(*shapes).jaxpr)

    states, logits = tokens * HIDDEN, tokens * vocab
    # Forward alone (the body of a custom VJP) and with its backward pass.
    for wrap in (total, with_gradient):
        assert largest(wrap(token_logprobs)) == states
        assert largest(wrap(naive)) == logits

    def temporary(function):
        return with_gradient(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(token_logprobs) < 6 * 4 * states
    assert temporary(naive) > 2 * 4 * logits


def test_chunks_of_logits_are_of_the_sizes_that_were_measured(monkeypatch):
    """4,096 tokens of Qwen3's vocabulary: the largest array is the head, then come chunks."""
    monkeypatch.undo()
    args = (
        jnp.zeros((1, 1, 4096, 2)),
        jax.ShapeDtypeStruct((151_936, 2), jnp.float32),
        jnp.zeros((1, 1, 4096), int),
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    text = str(jax.make_jaxpr(token_logprobs)(*shapes))
    assert "f32[512,2026]" in text  # 75 chunks of at most 2,048
