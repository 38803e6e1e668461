"""The unembedding without the [batch, time, vocab] logits."""

import jax
import jax.numpy as jnp

_CHUNK_TOKENS = 1024  # logits that exist at one time


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of target tokens, and entropies, of softmax(hidden @ head.T / temperature).

    Runs over slices of the time axis and recomputes each in the backward pass, so at most about
    1,024 tokens' logits exist at one time; log-sum-exp in float32.

    Args:
      hidden: [N, B, T, hidden], states that predict `targets`.
      head: [V, hidden].
      targets: int [N, B, T].
    Returns:
      float32 log-probabilities and entropies (nats), each [N, B, T].
    """
    n, b, t, _ = hidden.shape
    size = max(1, min(t, _CHUNK_TOKENS // (n * b)))
    padding = -t % size

    def slices(x):  # [N, B, T, ...] -> [T / size, N, B, size, ...]: rows keep their sharding
        x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(n, b, -1, size, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def one(args):
        h, target = args
        # Cast in here, so that the chunks' gradients of `head` add up in its own dtype (float32).
        weight = head.astype(h.dtype)
        logits = jnp.einsum("nbtd,vd->nbtv", h, weight, preferred_element_type=jnp.float32)
        logits = logits / temperature
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        logits = logits - total[..., None]
        return chosen - total, -(jnp.exp(logits) * logits).sum(-1)

    logprobs, entropy = jax.lax.map(one, (slices(hidden), slices(targets)))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(n, b, -1)[..., :t] for x in (logprobs, entropy))
