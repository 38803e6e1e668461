"""Sampling from a network with sliding attention: new keys lie beyond the padding of given tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.models import Qwen3
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig


@pytest.fixture(scope="module")
def sliding(model):
    """The small network with a window of 3 tokens in its second layer, on the same weights."""
    kinds = ("full_attention", "sliding_attention")
    config = dataclasses.replace(model.config, sliding_window=3, layer_types=kinds)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(model))


@pytest.mark.parametrize("branch", [0, 6])
def test_greedy_equals_flat(model, sliding, draw_rows, flat_logprobs, branch):
    given = [[0, 0, 0], [0]] if branch == 0 else [[3, 0, 5], [1]]
    rows = draw_rows([7, 4], given)
    for prefix in rows[0]:
        prefix[:2] = 5, 6  # shared
    planned = [RowLengths(12, [branch] * 3)] * 3
    greedy = SamplingConfig(temperature=0)
    run = Sampler(sliding, planned, new_tokens=8, stop_ids=(), shared=(5, 6), sampling=greedy)
    results = run.generate(nnx.state(sliding), *rows, jax.random.key(0))
    completions = [completion for row in results for completion in row]
    full = flat_logprobs(model, *rows, results)
    for completion, logprobs, other in zip(
        completions, flat_logprobs(sliding, *rows, results), full, strict=True
    ):
        np.testing.assert_array_equal(completion.tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, logprobs.max(-1), rtol=0, atol=1e-5)
        assert np.abs(logprobs - other).max() > 0.01  # the window matters
