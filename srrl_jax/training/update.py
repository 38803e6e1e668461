"""The jitted update: GRPO with a KL penalty, accumulated over microbatches, then AdamW."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from srrl_jax.losses import grpo_loss, kl_penalty, token_mean
from srrl_jax.models import branch_logprobs
from srrl_jax.training.batch import UpdateBatch
from srrl_jax.training.config import OptimizerConfig, TrainConfig


def make_schedule(c: OptimizerConfig) -> optax.Schedule:
    """Learning rate by number of updates done: linear from 0 over the warm-up, then constant."""
    if c.warmup_steps == 0:  # optax would hold a warm-up of no steps at its start, zero, for ever
        return optax.schedules.constant_schedule(c.learning_rate)
    return optax.schedules.warmup_constant_schedule(0.0, c.learning_rate, c.warmup_steps)


def make_optimizer(c: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; norms and biases are decayed like the rest, as in the paper."""
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip),
        optax.adamw(make_schedule(c), b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay),
    )


@partial(jax.jit, static_argnames="graphdef")
def completion_logprobs(graphdef, params, batch: UpdateBatch, temperature) -> jax.Array:
    """Log-probabilities [M, N, G, L] of a microbatched batch, under `params` (the reference)."""

    def one(_, tree):
        return None, branch_logprobs(nnx.merge(graphdef, params), tree, temperature)[0]

    return jax.lax.scan(one, None, batch.tree)[1]


def make_update(graphdef, config: TrainConfig, optimizer: optax.GradientTransformation):
    """The update as one jitted function (params, opt_state, batch) -> (params, opt_state, metrics).

    `batch` is an UpdateBatch with a leading axis of microbatches; parameters and optimizer state are
    donated. Metrics are float32 scalars.
    """
    loss_config, temperature = config.loss, config.rollout.sampling.temperature

    def microbatch_loss(params, batch: UpdateBatch, total):
        model = nnx.merge(graphdef, params)
        logprobs, entropy = branch_logprobs(model, batch.tree, temperature, remat=config.optimizer.remat)
        policy, clipped = grpo_loss(
            logprobs, batch.logprobs, batch.advantages, loss_config.clip_low, loss_config.clip_high
        )
        kl = jnp.zeros_like(logprobs)
        if config.kl_coef > 0:
            kl = kl_penalty(logprobs, batch.reference_logprobs, loss_config.kl_estimator)
        values = {"loss": policy + config.kl_coef * kl, "kl": kl, "entropy": entropy, **clipped}
        means = {name: token_mean(value, batch.mask, total) for name, value in values.items()}
        gap = jnp.where(batch.mask, jnp.abs(logprobs - batch.logprobs), 0.0).max()
        return means["loss"], (means, gap)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, batch: UpdateBatch):
        total = batch.mask.sum()

        def accumulate(carry, microbatch):
            grads, means, gap = carry
            (_, (more, wider)), more_grads = jax.value_and_grad(microbatch_loss, has_aux=True)(
                params, microbatch, total
            )
            add = partial(jax.tree.map, jnp.add)
            return (add(grads, more_grads), add(means, more), jnp.maximum(gap, wider)), None

        names = ("loss", "kl", "entropy", "clip_frac/low", "clip_frac/high")
        start = (jax.tree.map(jnp.zeros_like, params), dict.fromkeys(names, jnp.float32(0)), jnp.float32(0))
        (grads, means, gap), _ = jax.lax.scan(accumulate, start, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {**means, "logprob_diff/max": gap, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, metrics

    return update
