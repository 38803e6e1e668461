"""The objective against NumPy float64 oracles written from the formulas."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from srrl_jax.losses import (
    group_advantages,
    grpo_loss,
    importance_weights,
    kl_penalty,
    log_ratios,
    overlong_penalty,
    sequence_log_ratios,
    token_weights,
    weighted_sum,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.sampled_from([(1, 1), (2, 3), (3, 8)])
LIMIT = 20.0  # of |log ratio|, where exponentials are cut to stay finite


def floats(shape, low, high):
    return arrays(np.float32, shape, elements=st.floats(low, high, width=32, allow_subnormal=False))


def advantages_oracle(rewards, valid, how, eps=1e-6):
    out = np.zeros(rewards.shape)
    for n, (row, ok) in enumerate(zip(rewards.astype(np.float64), valid, strict=True)):
        if ok.sum() < 2 or np.ptp(row[ok]) == 0:
            continue
        for g in np.flatnonzero(ok):
            if how == "leave_one_out":
                out[n, g] = row[g] - np.mean([row[i] for i in np.flatnonzero(ok) if i != g])
            elif how == "best":
                out[n, g] = g == next(i for i in np.flatnonzero(ok) if row[i] == row[ok].max())
            else:
                scale = row[ok].std(ddof=1) + eps if how == "std" else 1.0
                out[n, g] = (row[g] - row[ok].mean()) / scale
    return out


HOW = ["std", "mean", "leave_one_out", "best"]


@quick
@given(st.data(), st.sampled_from(HOW))
def test_advantages(data, how):
    shape = data.draw(shapes)
    # Rewards are ratios of points, so they come in steps; NaN stands for "no reward".
    steps = data.draw(arrays(np.int32, shape, elements=st.integers(-200, 100)))
    valid = data.draw(arrays(bool, shape))
    rewards = np.where(valid, steps / np.float32(100), data.draw(st.sampled_from([0, np.nan, np.inf])))
    actual = jax.jit(group_advantages, static_argnums=2)(rewards, valid, how)
    assert actual.dtype == jnp.float32
    expected = advantages_oracle(rewards.astype(np.float32), valid, how)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    if how != "best":
        np.testing.assert_allclose(np.where(valid, actual, 0).sum(-1), 0, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_advantages_without_variance_are_zero(how):
    """Exactly: rounding of the mean must not pass for variance, whatever the reward and group size."""
    for size in (1, 3, 7, 8):
        rewards = np.repeat(np.linspace(-1, 1, 41, dtype=np.float32)[:, None], size, axis=1)
        np.testing.assert_array_equal(group_advantages(rewards, how=how), 0)


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.5, np.nan], [0.3, np.nan, np.nan, np.nan], [0.2, 0.7, 0.2, 0.7]])
    valid = ~np.isnan(rewards)
    half = np.sqrt(3) / 2  # 0.25 / std([.2, .7, .2, .7], ddof=1)
    expected = [[1, -1, 0, 0], [0, 0, 0, 0], [-half, half, -half, half]]
    np.testing.assert_allclose(group_advantages(rewards, valid), expected, atol=1e-5)
    plain = [[0.5, -0.5, 0, 0], [0, 0, 0, 0], [-0.25, 0.25, -0.25, 0.25]]
    np.testing.assert_allclose(group_advantages(rewards, valid, "mean"), plain, atol=1e-6)
    others = [[0.75, -0.75, 0, 0], [0, 0, 0, 0], [-1 / 3, 1 / 3, -1 / 3, 1 / 3]]
    np.testing.assert_allclose(group_advantages(rewards, valid, "leave_one_out"), others, atol=1e-6)
    best = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_array_equal(group_advantages(rewards, valid, "best"), best)


def test_advantages_of_another_kind():
    with pytest.raises(ValueError, match="'median' is not one of std, mean, leave_one_out, best"):
        group_advantages(np.zeros((1, 2)), how="median")


@st.composite
def objectives(draw, largest=5.0):
    """Log-probabilities of both policies [N, G, L], advantages [N, G], bounds."""
    shape = draw(shapes)
    size = (*shape, 5)
    old = draw(floats(size, -30, 0))
    ratio = draw(floats(size, -largest, largest))
    bounds = draw(st.sampled_from([(0.2, 0.28, np.inf), (0.1, 0.1, 1.5), (0.5, 2.0, 3.5)]))
    return old + ratio, old, draw(floats(shape, -3, 3)), bounds


def grpo_oracle(logprobs, old, advantages, low, high, dual):
    log_ratio = np.float64(logprobs - old)  # the difference itself is float32 in both
    ratio = np.exp(np.clip(log_ratio, -LIMIT, LIMIT))
    a = np.broadcast_to(advantages[..., None], ratio.shape).astype(np.float64)
    gain = np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
    with np.errstate(invalid="ignore"):
        gain = np.where(a < 0, np.maximum(gain, dual * a), gain)
    cut = {"low": (ratio < 1 - low) & (a < 0), "high": (ratio > 1 + high) & (a > 0)}
    cut["dual"] = (ratio > dual) & (a < 0)
    inside = np.abs(log_ratio) < LIMIT
    gradient = np.where(cut["low"] | cut["high"] | cut["dual"] | ~inside, 0.0, -ratio * a)
    at_a_bound = np.min([np.abs(ratio - bound) for bound in (1 - low, 1 + high, dual)], axis=0) < 1e-6
    return -gain, cut, gradient, at_a_bound | (np.abs(log_ratio) == LIMIT)


@jax.jit
def grpo_and_gradients(logprobs, old, advantages, low, high, dual):
    def total(x, y):
        out = grpo_loss(log_ratios(x, y), advantages, low, high, dual)
        return out[0].sum(), out

    gradients, out = jax.grad(total, argnums=(0, 1), has_aux=True)(logprobs, old)
    return out, gradients


@quick
@given(objectives() | objectives(largest=2000.0))
def test_grpo(objective):
    logprobs, old, advantages, bounds = objective
    (loss, masks), (actual, to_old) = grpo_and_gradients(logprobs, old, advantages, *bounds)
    expected, cut, gradient, ambiguous = grpo_oracle(logprobs, old, advantages, *bounds)
    assert loss.shape == logprobs.shape and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
    clear = ~ambiguous
    for side in ("low", "high", "dual"):
        np.testing.assert_array_equal(np.asarray(masks[f"clip_frac/{side}"])[clear], cut[side][clear])

    assert np.isfinite(actual).all()
    np.testing.assert_allclose(np.asarray(actual)[clear], gradient[clear], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(to_old, 0)


@jax.jit
@jax.value_and_grad
def gspo_and_gradient(logprobs, old, mask, advantages, low, high):
    ratios = sequence_log_ratios(log_ratios(logprobs, old), mask)
    per_token = grpo_loss(ratios, advantages, low, high)[0]
    return weighted_sum(per_token, token_weights(mask, "sequence"))


@quick
@given(objectives(), st.data())
def test_gspo(objective, data):
    """The sequence ratio and weights give GSPO's loss and gradient, written from its equations 5 and 7."""
    logprobs, old, advantages, (low, high, _) = objective
    mask = data.draw(arrays(bool, logprobs.shape))
    value, gradient = gspo_and_gradient(logprobs, old, mask, advantages, low, high)
    total, slopes, sequences = 0.0, np.zeros(logprobs.shape), max(mask.any(-1).sum(), 1)
    difference = np.float64(logprobs - old)
    near = False
    for n, g in zip(*np.nonzero(mask.any(-1)), strict=True):
        counts, a = mask[n, g], np.float64(advantages[n, g])
        s = np.exp(difference[n, g][counts].mean())
        total -= min(s * a, np.clip(s, 1 - low, 1 + high) * a) / sequences
        cut = (s < 1 - low and a < 0) or (s > 1 + high and a > 0)
        slopes[n, g][counts] = 0.0 if cut else -s * a / sequences / counts.sum()
        near = near or min(abs(s - 1 + low), abs(s - 1 - high)) < 1e-5
    np.testing.assert_allclose(value, total, rtol=1e-4, atol=1e-5)
    if not near:
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


@jax.jit
def importance_and_gradients(old, sampler, cap):
    weights, back = jax.vjp(lambda x, y: importance_weights(x, y, cap), old, sampler)
    return weights, back(jnp.ones_like(weights))


@quick
@given(objectives(largest=2000.0) | objectives(), st.sampled_from([0.5, 2.0, 1e9]))
def test_importance_weights(objective, cap):
    old, sampler, _, _ = objective
    weights, gradients = importance_and_gradients(old, sampler, cap)
    expected = np.minimum(np.exp(np.clip(np.float64(old - sampler), -LIMIT, LIMIT)), cap)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert not any(gradient.any() for gradient in gradients)


@quick
@given(arrays(np.int32, shapes, elements=st.integers(0, 50)), st.integers(0, 50))
def test_overlong_penalty(lengths, buffer):
    """DAPO's equation 13, negated: longest 50, and a buffer of which the last tokens are."""

    def penalty(length):
        if length <= 50 - buffer:
            return 0.0
        return (length - (50 - buffer)) / buffer

    expected = np.vectorize(penalty, otypes=[float])(lengths)
    np.testing.assert_allclose(overlong_penalty(lengths, 50, buffer), expected, rtol=1e-6)


def test_overlong_penalty_by_hand():
    lengths = np.array([[0, 80], [90, 100]])
    np.testing.assert_allclose(overlong_penalty(lengths, 100, 20), [[0, 0], [0.5, 1]])
    assert not overlong_penalty(lengths, 100, 0).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "dual"),
    [
        (1.5, 1.0, -1.28, "high", jnp.inf),
        (1.5, -1.0, 1.5, None, jnp.inf),
        (0.5, -1.0, 0.8, "low", jnp.inf),
        (0.5, 1.0, -0.5, None, jnp.inf),
        (1.25, 1.0, -1.25, None, jnp.inf),  # beyond the low bound's mirror image: the bounds are separate
        (4.0, -1.0, 3.0, "dual", 3.0),
        (4.0, 1.0, -1.28, "high", 3.0),
    ],
)
def test_grpo_clips_one_side(ratio, advantage, loss, clipped, dual):
    logprobs = jnp.log(jnp.full((1, 1, 1), ratio))
    actual, masks = grpo_loss(logprobs, jnp.full((1, 1), advantage), 0.2, 0.28, dual)
    np.testing.assert_allclose(actual[0, 0, 0], loss, rtol=1e-6)
    sides = ("low", "high", "dual")
    assert [side for side in sides if masks[f"clip_frac/{side}"].all()] == [clipped] * bool(clipped)


def test_grpo_on_policy_gradient_is_reinforce():
    logprobs, advantages = jnp.full((2, 3, 4), -1.7), jnp.arange(6.0).reshape(2, 3) - 2.5
    gradient = jax.grad(lambda x: grpo_loss(log_ratios(x, logprobs), advantages)[0].sum())(logprobs)
    np.testing.assert_allclose(gradient, -np.broadcast_to(advantages[..., None], (2, 3, 4)), rtol=1e-6)


def kl_oracle(logprobs, reference, estimator):
    """Values, and gradients by `logprobs`."""
    d = np.float64(reference - logprobs)
    if estimator == "k1":
        return -d, np.ones_like(d)
    if estimator == "k2":
        return d**2 / 2, -d
    e = np.minimum(d, LIMIT)
    return np.expm1(e) - e, np.where(d < LIMIT, -np.expm1(e), 0.0)


@partial(jax.jit, static_argnums=2)
def kl_and_gradients(logprobs, reference, estimator):
    def total(x, y):
        values = kl_penalty(x, y, estimator)
        return values.sum(), values

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(logprobs, reference)
    return values, gradients


@quick
@given(objectives() | objectives(largest=2.0**-10) | objectives(largest=2000.0))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(estimator, objective):
    logprobs, reference, _, _ = objective
    values, (actual, to_reference) = kl_and_gradients(logprobs, reference, estimator)
    assert values.shape == logprobs.shape and values.dtype == jnp.float32
    expected, gradient = kl_oracle(logprobs, reference, estimator)
    # expm1(d) - d cancels to about d^2 / 2 of the size of d.
    rounding = 3e-7 * np.minimum(np.abs(reference - logprobs), 10)
    assert (np.abs(values - expected) <= 1e-5 * np.abs(expected) + rounding).all()

    clear = np.abs(reference - logprobs) != LIMIT
    np.testing.assert_allclose(np.asarray(actual)[clear], gradient[clear], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_reference, 0)


def test_kl_k3_never_pushes_away():
    """However far the policy lies below the reference, no gradient step takes it further down."""
    gradient = jax.grad(lambda x: kl_penalty(x, jnp.zeros(5)).sum())(-jnp.array([0.1, 5, 19, 21, 300.0]))
    assert (gradient <= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_unbiased(estimator):
    """The expectation over the policy, summed exactly, is the divergence."""
    random = np.random.default_rng(0)
    policy, reference = (np.asarray(jax.nn.log_softmax(x)) for x in random.standard_normal((2, 9)))
    exact = (np.exp(policy) * (policy - reference)).sum()
    values = np.asarray(kl_penalty(policy, reference, estimator))
    np.testing.assert_allclose((np.exp(policy) * values).sum(), exact, rtol=1e-5)


def test_kl_unknown_estimator():
    with pytest.raises(ValueError, match="'k4' is not one of k1, k2, k3"):
        kl_penalty(jnp.zeros(1), jnp.zeros(1), "k4")


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_by_finite_differences(estimator):
    """The whole loss in float64 inputs, away from the bounds, central differences."""
    random = np.random.default_rng(0)
    old = -random.random((2, 2, 3)) * 3
    reference = old + 0.3 * random.standard_normal(old.shape)
    advantages = random.standard_normal((2, 2))
    weights = token_weights(random.random(old.shape) < 0.7)

    @jax.jit
    def objective(x):
        per_token = grpo_loss(log_ratios(x, old), advantages)[0] + 0.1 * kl_penalty(x, reference, estimator)
        return weighted_sum(per_token, weights)

    with jax.enable_x64(True):
        x = jnp.asarray(old + 0.1 * random.uniform(-1, 1, old.shape))
        assert x.dtype == jnp.float64
        gradient = np.asarray(jax.grad(objective)(x))
        for index in np.ndindex(x.shape):
            up, down = objective(x.at[index].add(1e-5)), objective(x.at[index].add(-1e-5))
            np.testing.assert_allclose(gradient[index], (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


@partial(jax.jit, static_argnums=2)
def weigh(values, mask, how):
    """The weights, the weighted sum and its gradient."""
    weights = token_weights(mask, how, 7)
    return weights, *jax.value_and_grad(weighted_sum)(values, weights)


@quick
@given(st.data(), st.sampled_from(["token", "sequence", "constant"]))
def test_token_weights(data, how):
    shape = (*data.draw(shapes), 5)
    values, mask = data.draw(floats(shape, -100, 100)), data.draw(arrays(bool, shape))
    values = np.where(mask, values, np.float32(np.nan))  # padding may hold anything
    chosen = [
        row[ok].astype(np.float64) for row, ok in zip(values.reshape(-1, 5), mask.reshape(-1, 5), strict=True)
    ]
    chosen = [row for row in chosen if len(row)]
    if not chosen:
        expected = 0.0
    elif how == "token":
        expected = np.concatenate(chosen).mean()
    elif how == "sequence":
        expected = np.mean([row.mean() for row in chosen])
    else:
        expected = np.sum([row.sum() / 7 for row in chosen]) / len(chosen)
    weights, total, gradient = weigh(values, mask, how)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient, weights)


def test_another_aggregation():
    with pytest.raises(ValueError, match="'median' is not one of token, sequence, constant"):
        token_weights(np.ones((1, 1, 1), bool), "median")


def test_imports_nothing_of_the_package():
    code = "import srrl_jax.losses, sys; print(*sorted(m for m in sys.modules if m.startswith('srrl_jax')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["srrl_jax", "srrl_jax.losses"]
