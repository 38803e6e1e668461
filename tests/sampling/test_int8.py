"""Decoding in 8 bits: how far its log-probabilities are from those of teacher forcing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.kernels import gpu_decode
from srrl_jax.kernels.int8 import quantize
from srrl_jax.sampling import RowLengths, Sampler
from srrl_jax.sampling.decoder import Decoder


def test_quantize_is_off_by_half_a_level_at_most():
    x = jax.random.normal(jax.random.key(0), (5, 64)) * jnp.array([[1e-3], [1.0], [1e3], [0.0], [1e-30]])
    values, scale = quantize(x, axis=1)
    assert values.dtype == jnp.int8 and scale.shape == (5, 1)
    error = np.abs(np.asarray(values * scale - x))
    assert (error <= np.abs(x).max(1, keepdims=True) / 254 * (1 + 1e-4)).all()
    assert (np.abs(values).max(1) == [127, 127, 127, 0, 127]).all()


@pytest.fixture(scope="module")
def gap(model, params, draw_rows, flat_logprobs):
    """Mean gap between the log-probabilities of a sampler with `int8` and those of the whole sequences."""
    rows = draw_rows([7, 4, 10, 5, 8], [[3, 0, 5], [1, 4], [5], [0, 0, 0], [2, 3, 1]])

    def measure(int8: str) -> float:
        planned = [RowLengths(12, [6] * 3)] * 3
        run = Sampler(model, planned, new_tokens=8, stop_ids=(-1, -1), int8=int8)
        results = run.generate(params, *rows, jax.random.key(0))
        drawn = [completion for row in results for completion in row]
        gaps = [
            np.abs(completion.logprobs - logprobs[np.arange(8), completion.tokens])
            for completion, logprobs in zip(drawn, flat_logprobs(model, *rows, results), strict=True)
        ]
        return float(np.mean(gaps))

    return measure


@pytest.mark.slow
def test_the_gap_to_the_trainer(gap):
    none, weights, weights_kv = map(gap, ("none", "weights", "weights_kv"))
    assert none < 1e-5
    assert 1e-3 < weights < 0.03
    assert 1e-3 < weights_kv < 0.03 and weights_kv != weights


def test_joined_products_with_caches_in_8_bits_draw_the_same(model, monkeypatch):
    """Weights as GPUs decode them, with XLA's attention, which caches of 8 bits take there too."""
    other = nnx.merge(*nnx.split(model))  # as samplers of equal networks share their programs
    other.config = dataclasses.replace(model.config, max_position_embeddings=66)

    def draw(network):
        run = Sampler(network, [RowLengths(5, [0, 0])], new_tokens=6, stop_ids=(-1,), int8="weights_kv")
        ((first, second),) = run.generate(nnx.state(network), [[5, 6, 7, 8]], [[[], []]], jax.random.key(0))
        return first, second

    expected = draw(model)
    monkeypatch.setattr(gpu_decode, "computes", lambda *_: True)
    for found, wanted in zip(draw(other), expected, strict=True):
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=1e-5)


def test_what_is_kept_in_8_bits(model, params):
    before = jax.tree.map(jnp.copy, params)
    state = dict(nnx.to_flat_state(nnx.state(Decoder(model, int8=True))))
    kept = {path for path, variable in state.items() if variable.dtype == jnp.int8}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(path[-2] for path in kept) == sorted(names * model.config.num_hidden_layers)
    for path in kept:
        weight, scale = state[path][...], state[(*path[:-1], "scale")][...]
        assert scale.shape == weight.shape[:1] and scale.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
