"""Sampling from a mixture of experts: layers of two kinds, which decoding takes apart one by one."""

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig


@pytest.mark.parametrize(
    ("int8", "least", "most"),
    [("none", 0, 1e-5), pytest.param("weights_kv", 1e-3, 0.1, marks=pytest.mark.slow)],
)
def test_samples_have_the_log_probabilities_of_flat_sequences(
    experts, draw_rows, flat_logprobs, int8, least, most
):
    rows = draw_rows([7, 4, 10], [[3, 0, 5], [1, 4], [5]])
    planned = [RowLengths(12, [6] * 3)] * 3
    run = Sampler(
        experts, planned, new_tokens=8, stop_ids=tuple(range(9)), sampling=SamplingConfig(0.8), int8=int8
    )
    results = run.generate(nnx.state(experts), *rows, jax.random.key(0))
    drawn = [completion for row in results for completion in row]
    assert min(len(c.tokens) for c in drawn) < max(len(c.tokens) for c in drawn) == 8  # some stopped
    gaps = [
        np.abs(c.logprobs - logprobs[np.arange(len(c.tokens)), c.tokens])
        for c, logprobs in zip(drawn, flat_logprobs(experts, *rows, results, 0.8), strict=True)
    ]
    assert least <= np.mean(np.concatenate(gaps)) <= most
