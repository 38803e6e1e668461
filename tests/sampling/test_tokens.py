"""Drawing a token: exact support and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from srrl_jax.errors import InputError
from srrl_jax.sampling import SamplingConfig
from srrl_jax.sampling.tokens import choose

VOCAB = 12
LOGITS = np.linspace(-2, 1.5, VOCAB)[np.random.default_rng(0).permutation(VOCAB)].astype(np.float32)
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.6),
    SamplingConfig(temperature=2.0),
    SamplingConfig(top_k=4),
    SamplingConfig(top_p=0.8),
    SamplingConfig(min_p=0.15),
    SamplingConfig(temperature=0.8, top_k=7, top_p=0.9, min_p=0.2),
    SamplingConfig(temperature=1.5, top_k=9, top_p=0.75),
]


def probabilities(logits, s: SamplingConfig, allowed=None) -> np.ndarray:
    """transformers' warpers in their order, float64: temperature, top_k, top_p, min_p.

    Each sets scores to -inf, and the next one's softmax renormalises.
    """

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    scores = np.float64(logits) / s.temperature
    scores[len(scores) if allowed is None else allowed :] = -np.inf
    if s.top_k:
        kth = np.sort(scores)[-min(s.top_k, len(scores))]
        scores[scores < kth] = -np.inf
    if s.top_p < 1:
        order = np.argsort(scores, kind="stable")
        scores[order[np.cumsum(softmax(scores[order])) <= 1 - s.top_p]] = -np.inf
    if s.min_p > 0:
        probs = softmax(scores)
        scores[probs < s.min_p * probs.max()] = -np.inf
    return softmax(scores)


def draw(logits, s: SamplingConfig, count, seed=0, allowed=None):
    """`count` draws from one distribution, each with its own key."""
    tokens, logprobs = choose(
        jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))),
        jax.random.split(jax.random.key(seed), count),
        jnp.float32(s.temperature),
        jnp.float32(s.top_p),
        jnp.float32(s.min_p),
        top_k=s.top_k,
        truncates=s.truncates,
        allowed=jnp.int32(len(logits) if allowed is None else allowed),
    )
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    return np.asarray(tokens), np.asarray(logprobs)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("allowed", [VOCAB, 8])
def test_frequencies(config, allowed):
    tokens, logprobs = draw(LOGITS, config, 20_000, allowed=allowed)
    probs = probabilities(LOGITS, config, allowed)
    counts = np.bincount(tokens, minlength=VOCAB)
    support = probs > 0
    assert len(counts) == VOCAB and not counts[~support].any()
    assert (20_000 * probs[support]).min() > 5
    if support.sum() > 1:
        assert chisquare(counts[support], 20_000 * probs[support]).pvalue > 0.001
    # Not of the truncated distribution: what training recomputes.
    expected = log_softmax(np.float64(LOGITS) / config.temperature)[tokens]
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("size", "allowed", "config"),
    [(300, 290, SamplingConfig()), (64, 64, SamplingConfig(0.7)), (300, 290, SamplingConfig(top_k=40))],
    ids=str,
)
def test_frequencies_of_more_tokens_than_are_drawn_at_one_time(size, allowed, config):
    """Columns of unlike weight, the last one short, and one without any token that may be drawn."""
    logits = np.random.default_rng(2).uniform(-1.5, 1.5, size).astype(np.float32)
    columns = -(-size // 32)
    logits[1::columns] += 1
    logits[4 :: max(columns, 5)] = -np.inf
    tokens, logprobs = draw(logits, config, 100_000, allowed=allowed)
    probs = probabilities(logits, config, allowed)
    support = probs > 0
    counts = np.bincount(tokens, minlength=size)
    assert not counts[~support].any() and (100_000 * probs[support]).min() > 5
    assert chisquare(counts[support], 100_000 * probs[support]).pvalue > 0.001
    np.testing.assert_allclose(
        logprobs, log_softmax(np.float64(logits) / config.temperature)[tokens], atol=2e-6
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-200, 200), min_size=8, max_size=8, unique=True),
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([8, 5]),
)
def test_support(hundredths, top_k, top_p, min_p, temperature, allowed):
    config = SamplingConfig(temperature, top_k, top_p, min_p)
    logits = np.float32(hundredths) / np.float32(100)
    probs = probabilities(logits, config, allowed)
    # Leave out what a rounding decides: the same with bounds a little to either side.
    for sign in (-1, 1):
        near = SamplingConfig(
            temperature, top_k, min(1, top_p * (1 + sign * 1e-5)), min(1, min_p * (1 + sign * 1e-5))
        )
        assume(((probabilities(logits, near, allowed) > 0) == (probs > 0)).all())
    seen = np.bincount(draw(logits, config, 4000, allowed=allowed)[0], minlength=8) > 0
    assert not seen[probs == 0].any()
    assert seen[probs > 0.005].all()  # misses one with probability 2e-9


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_reference_equals_transformers(config):
    """The NumPy reference of these tests against the warpers it claims to be."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    warpers = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(config.temperature)])
    if config.top_k:
        warpers.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(theirs.MinPLogitsWarper(config.min_p))
    expected = warpers(None, torch.from_numpy(LOGITS[None].copy())).softmax(-1)[0].numpy()
    np.testing.assert_allclose(probabilities(LOGITS, config), expected, atol=1e-6)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3, "top_p": 0.5}])
def test_greedy(truncation):
    logits = np.random.default_rng(1).standard_normal((64, VOCAB)).astype(np.float32)
    s = SamplingConfig(temperature=0, **truncation)
    for seed in range(2):
        tokens, logprobs = choose(
            logits.reshape(8, 8, VOCAB),
            jax.random.split(jax.random.key(seed), (8, 8)),
            jnp.float32(0),
            jnp.float32(s.top_p),
            jnp.float32(s.min_p),
            top_k=s.top_k,
            truncates=s.truncates,
            allowed=jnp.int32(9),
        )
        np.testing.assert_array_equal(tokens.reshape(-1), logits[:, :9].argmax(-1))
        expected = [log_softmax(row)[token] for row, token in zip(logits, tokens.reshape(-1), strict=True)]
        np.testing.assert_allclose(logprobs.reshape(-1), expected, atol=2e-6)


def test_a_draw_depends_on_its_own_key_and_logits_alone():
    keys = jax.random.split(jax.random.key(0), 16)
    logits = np.random.default_rng(1).standard_normal((16, VOCAB)).astype(np.float32)
    rest = (jnp.float32(1), jnp.float32(1), jnp.float32(0))
    options = dict(top_k=0, truncates=False, allowed=jnp.int32(VOCAB))
    together, _ = choose(logits, keys, *rest, **options)
    alone = [int(choose(logits[i], keys[i], *rest, **options)[0]) for i in range(16)]
    np.testing.assert_array_equal(together, alone)
    assert (together != choose(logits, keys[::-1], *rest, **options)[0]).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", np.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_bad_config(field, value):
    with pytest.raises(InputError, match=rf"^{field} must be .*, not {value}$"):
        SamplingConfig(**{field: value})
