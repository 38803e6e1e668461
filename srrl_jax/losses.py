"""The GRPO objective as pure functions of arrays; nothing here knows a model.

Shapes: N prompts, G completions a prompt (the group), L completion tokens. Log-probabilities are float32
[N, G, L]; `mask` is true at completion tokens that count.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_MAX_LOG_RATIO = 20.0  # e^20 is far beyond any clip range and still finite in float32


def group_advantages(
    rewards: ArrayLike, valid: ArrayLike | None = None, how: str = "std", eps: float = 1e-6
) -> jax.Array:
    """Reward against its group: with r the valid rewards of a group, k their number, s their deviation,

    - "std": (r_i - mean r) / (s + eps), DeepSeekMath (arXiv 2402.03300) section 4.1.2;
    - "mean": r_i - mean r, Dr. GRPO (2503.20783) section 3.2;
    - "leave_one_out": r_i - mean of the others = (r_i - mean r) k / (k - 1), RLOO (2402.14740) eq. 8;
    - "best": 1 for the group's best (the first of several), 0 for the others, so that an update is one of
      supervised learning from the best of k: RAFT (2304.06767).

    >>> rewards = np.array([[1.0, 0.0, 0.5]])  # of one prompt's three responses
    >>> group_advantages(rewards, how="mean").tolist()
    [[0.5, -0.5, 0.0]]

    A response without a reward (no scorable criterion) stays out of its group's baseline.

    Args:
      rewards: float [N, G]; entries that are not valid may hold anything, NaN included.
      valid: bool [N, G]; all true by default.
      how: one of the above.
    Returns:
      float32 [N, G]; 0 where not valid, and in groups with fewer than two valid or without variance.
    Raises:
      ValueError: another `how`.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    rewards = jnp.where(valid, rewards, 0.0)
    count = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    centred = jnp.where(valid, rewards - rewards.sum(-1, keepdims=True) / count, 0.0)
    others = jnp.maximum(count - 1, 1)
    match how:
        case "std":
            # The sample standard deviation, as torch.std and so most GRPO code has it.
            centred = centred / (jnp.sqrt((centred**2).sum(-1, keepdims=True) / others) + eps)
        case "leave_one_out":
            centred = centred * count / others
        case "mean":
            pass
        case "best":
            best = jnp.where(valid, rewards, -jnp.inf).argmax(-1, keepdims=True)
            centred = jnp.where(jnp.arange(rewards.shape[-1]) == best, 1.0, 0.0)
        case _:
            raise ValueError(f"advantage {how!r} is not one of std, mean, leave_one_out, best")
    # By comparison: where all rewards are equal, their rounded mean may still differ from them.
    varies = rewards.max(-1, keepdims=True, where=valid, initial=-jnp.inf) > rewards.min(
        -1, keepdims=True, where=valid, initial=jnp.inf
    )
    return jnp.where(varies, centred, 0.0)


def log_ratios(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
    """log(policy / old policy) of each token [N, G, L]; no gradient flows into `old_logprobs`."""
    return logprobs - jax.lax.stop_gradient(old_logprobs)


def sequence_log_ratios(token_log_ratios: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean log-ratio of each completion, at all of its tokens: [N, G, L] -> [N, G, L].

    GSPO (2507.18071) eq. 7: the ratio of a whole completion, length-normalised. With the weights of
    `token_weights(..., "sequence")` the sum over tokens is GSPO's loss, eq. 5.
    """
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean = jnp.where(mask, token_log_ratios, 0.0).sum(-1, keepdims=True) / count
    return jnp.broadcast_to(mean, token_log_ratios.shape)


def grpo_loss(
    log_ratios: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = jnp.inf,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate per token, to be minimised: -min(r A, clip(r, 1 - low, 1 + high) A).

    PPO (1707.06347) eq. 7 with DAPO's separate bounds (2503.14476, "clip-higher"). Where A < 0 it is
    at most -dual_clip A: dual-clip PPO (1912.09729) eq. 5. Aggregate with `token_weights`.

    Args:
      log_ratios: float32 [N, G, L], from `log_ratios` or `sequence_log_ratios`.
      advantages: float32 [N, G], one for all tokens of a completion.
      dual_clip: bound of the ratio under negative advantages, above 1 + clip_high; infinite is none.
    Returns:
      The loss of each token [N, G, L], and bool [N, G, L] masks `clip_frac/low`, `clip_frac/high`,
      `clip_frac/dual` of the tokens whose gradient the bounds cut off.
    """
    ratio = jnp.exp(jnp.clip(log_ratios, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    advantages = advantages[..., None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    bounded = jnp.where(advantages < 0, jnp.minimum(ratio, dual_clip), ratio)
    return -jnp.minimum(bounded * advantages, clipped * advantages), {
        "clip_frac/low": (ratio < 1 - clip_low) & (advantages < 0),
        "clip_frac/high": (ratio > 1 + clip_high) & (advantages > 0),
        "clip_frac/dual": (ratio > dual_clip) & (advantages < 0),
    }


def with_lessons(loss: jax.Array, logprobs: jax.Array, taught: jax.Array) -> jax.Array:
    """The loss of each token [N, G, L], -log policy (cross-entropy) in completions that are taught.

    Args:
      taught: bool [N, G], true where a completion is not the policy's own but a teacher's reply.
    """
    return jnp.where(taught[..., None], -logprobs, loss)


def importance_weights(old_logprobs: jax.Array, sampler_logprobs: jax.Array, cap: float) -> jax.Array:
    """min(old policy in the trainer / policy in the sampler, cap) of each token, without gradient.

    Truncated importance sampling: corrects for a sampler whose arithmetic differs from the trainer's
    (int8 weights, bfloat16 caches); Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training" (2025). Multiplies the loss of `grpo_loss`.

    Args:
      old_logprobs, sampler_logprobs: of the same weights, float32 [N, G, L].
      cap: above 0.
    """
    gap = jnp.clip(old_logprobs - sampler_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap), cap))


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


def overlong_penalty(lengths: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """What to take off rewards of long completions: 0 up to longest - buffer tokens, then up to 1.

    DAPO (2503.14476) eq. 13. No penalty where `buffer` is 0.

    Args:
      lengths: int, any shape, at most `longest`.
    Returns:
      float32, shaped as `lengths`.
    """
    over = np.maximum(np.asarray(lengths) - (longest - buffer), 0)
    return (over / max(buffer, 1)).astype(np.float32)


def token_weights(mask: jax.Array, how: str = "token", longest: int = 1) -> jax.Array:
    """Weights under which per-token values of a minibatch sum to its loss.

    With o_i the completions that have a token in `mask`, |o_i| their tokens and n their number:

    - "token": 1 / sum |o_i|, every token weighs the same: DAPO (2503.14476) eq. 8;
    - "sequence": 1 / (n |o_i|), every completion weighs the same: GRPO (2402.03300) eq. 3;
    - "constant": 1 / (n longest), no length in the denominator: Dr. GRPO (2503.20783), listing 1.

    Weights are of a whole minibatch, so the sums of its microbatches add up to the same loss.

    Args:
      mask: bool [..., L], true at the tokens that count.
      longest: limit of a completion, read by "constant" only.
    Returns:
      float32, shaped as `mask`, 0 where it is false.
    Raises:
      ValueError: another `how`.
    """
    lengths = mask.sum(-1, keepdims=True)
    completions = jnp.maximum((lengths > 0).sum(), 1)
    match how:
        case "token":
            size = jnp.maximum(mask.sum(), 1)
        case "sequence":
            size = completions * jnp.maximum(lengths, 1)
        case "constant":
            size = completions * longest
        case _:
            raise ValueError(f"aggregation {how!r} is not one of token, sequence, constant")
    return jnp.where(mask, 1.0 / size, 0.0).astype(jnp.float32)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of `values` x `weights`; values without weight may hold anything, NaN included."""
    return jnp.where(weights > 0, values * weights, 0.0).sum()
