"""Random trees through the sampler against flat sequences without any cache."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.kernels import gpu_decode, gpu_prefill
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig, engine

TREES = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 6), min_size=1, max_size=3)), min_size=1, max_size=5
)


SHARED = [(), (7, 7, 1, 30, 2, 9, 4, 4, 11)]


@pytest.fixture(scope="module", params=["xla", "gpu kernels"])
def network(request, model):
    """As on a GPU: its kernels are interpreted, and meet 8 keys at a time: several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "xla":
            yield model
        else:
            patch.setattr(gpu_prefill, "computes", lambda *_: True)
            for module in (gpu_decode, gpu_prefill):
                patch.setattr(module, "KEYS", 8)
            patch.setattr(gpu_prefill, "QUERIES", 16)
            patch.setattr(engine, "_copy_rows", engine._scatter_tokens)
            other = nnx.merge(*nnx.split(model))  # as samplers of equal networks share their programs
            other.config = dataclasses.replace(model.config, max_position_embeddings=65)
            yield other


@pytest.fixture(scope="module")
def samplers(network):
    """By what the prefixes begin with; stops at a few of its 50 tokens."""

    def make(shared):
        rows = [RowLengths(12 + len(shared), [6, 6, 6]), RowLengths(5 + len(shared), [3])]
        greedy = SamplingConfig(temperature=0)
        return Sampler(
            network, rows, together=2, new_tokens=8, stop_ids=(3, 17, 40), sampling=greedy, shared=shared
        )

    return {shared: make(shared) for shared in SHARED}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(tree=TREES, seed=st.integers(0, 1000), shared=st.sampled_from(SHARED))
def test_greedy_equals_flat(network, samplers, draw_rows, flat_logprobs, tree, seed, shared):
    """With rows and branches packed, and with shared tokens where all prefixes begin alike."""
    prefixes, branches = draw_rows([prefix for prefix, _ in tree], [branches for _, branches in tree], seed)
    rows = [[*shared, *prefix] for prefix in prefixes], branches
    sampler = samplers[shared]
    results = sampler.generate(nnx.state(network), *rows, jax.random.key(seed))
    completions = sum(results, [])
    assert [len(row) for row in results] == [len(branches) for _, branches in tree]
    for completion, logprobs in zip(completions, flat_logprobs(network, *rows, results), strict=True):
        np.testing.assert_array_equal(completion.tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, logprobs.max(-1), rtol=0, atol=1e-5)
        stops = np.isin(completion.tokens, sampler.stop_ids)
        assert not stops[:-1].any() and completion.truncated == (not stops[-1])
        assert len(completion.tokens) == 8 or stops[-1]
