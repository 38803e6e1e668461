"""Scores against flat sequences."""

import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.sampling import RowLengths, Sampler


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, [RowLengths(12, [6] * 3)] * 3, new_tokens=1, stop_ids=(1,))


def test_scores_are_log_probabilities_of_the_next_token(model, params, sampler, draw_rows, next_logits):
    prefixes, branches = draw_rows([7, 4, 10, 5, 8], [[3, 0, 5], [1, 4], [5], [0, 0, 0], [2, 3, 1]])
    told = []
    scores = sampler.score(params, prefixes, branches, [3, 41], lambda *wave: told.append(wave))
    assert told == [(7, 12), (12, 12)]
    again = sampler.score(params, prefixes[:1], branches[:1], [0, 1])
    assert again[0].shape == (3, 2)
    for prefix, row, logprobs in zip(prefixes, branches, scores, strict=True):
        assert logprobs.shape == (len(row), 2) and logprobs.dtype == np.float32
        for branch, pair in zip(row, logprobs, strict=True):
            logits = next_logits(model, prefix + branch, 18)
            expected = logits - np.log(np.exp(logits).sum())
            np.testing.assert_allclose(pair, expected[[3, 41]], rtol=0, atol=1e-5)


def test_what_was_not_planned_for_is_refused(params, sampler):
    with pytest.raises(InputError, match="row 1: 40 prefix tokens"):
        sampler.score(params, [[1], [1] * 40], [[[1]], [[1]]], [0, 1])
