"""The GRPO objective as pure functions of arrays; nothing here knows a model.

Shapes: N prompts, G completions a prompt (the group), L completion tokens. Log-probabilities are float32
[N, G, L]; `mask` is true at completion tokens that count.
"""

import jax
import jax.numpy as jnp

_MAX_LOG_RATIO = 20.0  # e^20 is far beyond any clip range and still finite in float32


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array | None = None,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> jax.Array:
    """Reward minus the group's mean, by default divided by its standard deviation.

    DeepSeekMath (arXiv 2402.03300) eq. 3; `normalize_std=False` is Dr. GRPO (2503.20783). A response
    without a reward (no scorable criterion) stays out of its group's baseline.

    Args:
      rewards: float [N, G]; entries that are not valid may hold anything, NaN included.
      valid: bool [N, G]; all true by default.
    Returns:
      float32 [N, G]; 0 where not valid, and in groups with fewer than two valid or without variance.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    rewards = jnp.where(valid, rewards, 0.0)
    count = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    centred = jnp.where(valid, rewards - rewards.sum(-1, keepdims=True) / count, 0.0)
    if normalize_std:
        # The sample standard deviation, as torch.std and so most GRPO code has it.
        std = jnp.sqrt((centred**2).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1))
        centred = centred / (std + eps)
    # By comparison: where all rewards are equal, their rounded mean may still differ from them.
    varies = rewards.max(-1, keepdims=True, where=valid, initial=-jnp.inf) > rewards.min(
        -1, keepdims=True, where=valid, initial=jnp.inf
    )
    return jnp.where(varies, centred, 0.0)


def grpo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate per token, to be minimised: -min(r A, clip(r, 1 - low, 1 + high) A).

    PPO (1707.06347) eq. 7 with DAPO's separate bounds (2503.14476, "clip-higher"). Aggregate with
    `token_mean`.

    Args:
      logprobs: under the policy that is being updated, float32 [N, G, L].
      old_logprobs: under the policy that sampled, the same shape; no gradient flows into them.
      advantages: float32 [N, G], one for all tokens of a completion.
    Returns:
      The loss of each token [N, G, L], and bool [N, G, L] masks `clip_frac/low`, `clip_frac/high` of
      the tokens whose gradient the bounds cut off.
    """
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    advantages = advantages[..., None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    return loss, {
        "clip_frac/low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_frac/high": (ratio > 1 + clip_high) & (advantages > 0),
    }


def kl_penalty(logprobs: jax.Array, reference_logprobs: jax.Array, estimator: str = "k3") -> jax.Array:
    """Per-token estimate of KL(policy || reference) from a token that the policy sampled.

    Schulman, "Approximating KL divergence" (2020), with d = log reference - log policy:
    k1 = -d (unbiased; its gradient has zero mean), k2 = d^2 / 2, k3 = e^d - 1 - d (unbiased, >= 0).

    Args:
      logprobs: float32 [...], gradients flow into it.
      reference_logprobs: float32 [...] under the frozen reference.
      estimator: "k1", "k2" or "k3".
    Raises:
      ValueError: another estimator.
    """
    d = jax.lax.stop_gradient(reference_logprobs) - logprobs
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d**2 / 2
        case "k3":
            d = jnp.minimum(d, _MAX_LOG_RATIO)  # both terms: e^d alone would turn the gradient's sign
            return jnp.expm1(d) - d
    raise ValueError(f"KL estimator {estimator!r} is not one of k1, k2, k3")


def token_mean(values: jax.Array, mask: jax.Array, total: jax.Array | float | None = None) -> jax.Array:
    """Sum over the tokens that count, divided by their number: every token weighs the same.

    DAPO (2503.14476) eq. 8. `total` is the number of tokens of the whole minibatch when `values` are
    only a microbatch of it, so that accumulated microbatches equal one large batch.
    """
    total = mask.sum() if total is None else total
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(total, 1)
