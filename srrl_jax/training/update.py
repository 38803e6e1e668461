"""The jitted update: GRPO with a KL penalty, accumulated over microbatches, then AdamW."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from srrl_jax.losses import (
    grpo_loss,
    importance_weights,
    kl_penalty,
    log_ratios,
    sequence_log_ratios,
    token_weights,
    weighted_sum,
    with_lessons,
)
from srrl_jax.models import branch_logprobs
from srrl_jax.parallel import train_layout
from srrl_jax.training.batch import UpdateBatch
from srrl_jax.training.config import OptimizerConfig, TrainConfig

NOTHING = nnx.State({})  # no weights


class TrainState(NamedTuple):
    """What an update changes: the policy's `nnx.state` and the optimizer's state."""

    params: Any
    opt_state: Any


def make_schedule(c: OptimizerConfig) -> optax.Schedule:
    """Learning rate by number of updates done: linear from 0 over the warm-up, then constant."""
    if c.warmup_steps == 0:  # optax would hold a warm-up of no steps at its start, zero, for ever
        return optax.schedules.constant_schedule(c.learning_rate)
    return optax.schedules.warmup_constant_schedule(0.0, c.learning_rate, c.warmup_steps)


def make_optimizer(c: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; norms and biases are decayed like the rest, as in the paper."""
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip),
        optax.adamw(
            make_schedule(c),
            b1=c.beta1,
            b2=c.beta2,
            weight_decay=c.weight_decay,
            mu_dtype=jnp.dtype(c.first_moment),
        ),
    )


@partial(jax.jit, static_argnames="graphdef")
def completion_logprobs(graphdef, params, batch: UpdateBatch, temperature) -> jax.Array:
    """Log-probabilities [M, N, G, L] of a microbatched batch, under `params` (the reference)."""

    def one(_, tree):
        return None, branch_logprobs(nnx.merge(graphdef, params), tree, temperature)[0]

    return jax.lax.scan(one, None, batch.tree)[1]


def make_update(graphdef, config: TrainConfig, optimizer: optax.GradientTransformation, remat: str):
    """The update as one jitted function (params, opt_state, batch, base) -> (params, opt_state, metrics).

    `batch` is an UpdateBatch with a leading axis of microbatches; parameters and optimizer state are
    donated. `base` are weights beside `params` that are not learnt (LoRA). Metrics are float32 scalars.
    Where the loss or the gradient is not finite nothing is changed, and `guard/skipped_updates` is 1.

    Args:
      remat: as in `Qwen3.extend`.
    """
    c, temperature = config.loss, config.rollout.sampling.temperature

    def microbatch_loss(params, base, batch: UpdateBatch, weights, share):
        model = nnx.merge(graphdef, params, base)
        logprobs, entropy, load = branch_logprobs(
            model, batch.tree, temperature, remat=remat, return_load=True
        )
        ratios = log_ratios(logprobs, batch.old_logprobs)
        if c.ratio == "sequence":
            ratios = sequence_log_ratios(ratios, batch.mask)
        loss, values = grpo_loss(ratios, batch.advantages, c.clip_low, c.clip_high, c.dual_clip or jnp.inf)
        if c.importance_cap is not None:
            trust = importance_weights(batch.old_logprobs, batch.logprobs, c.importance_cap)
            loss = loss * trust
            values |= {"importance/mean": trust, "importance/capped": trust >= c.importance_cap}
        if config.kl_coef > 0:
            values["kl"] = kl_penalty(logprobs, batch.reference_logprobs, c.kl_estimator)
            loss = loss + config.kl_coef * values["kl"]
        if c.entropy_coef > 0:
            loss = loss - c.entropy_coef * entropy
        if config.data.teacher_loss != "grpo":
            loss = with_lessons(loss, logprobs, batch.taught)
        loss = weighted_sum(loss, weights)
        # What a teacher wrote was not sampled, so there is nothing to compare it with.
        gap = jnp.where(batch.mask & ~batch.taught[..., None], jnp.abs(logprobs - batch.logprobs), 0.0)
        values |= {"entropy": entropy, "logprob_diff/mean": gap}
        means = {name: weighted_sum(value, share) for name, value in values.items()}
        if load is not None:
            means["experts/imbalance"] = load.imbalance() * share.sum()
            if c.balance_experts:
                loss = loss + model.config.moe.router_aux_loss_coef * means["experts/imbalance"]
        return loss, (means | {"loss": loss}, gap.max())

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, batch: UpdateBatch, base: Any = NOTHING):
        # Weights of the whole minibatch, so that its microbatches add up to one large batch.
        weights = token_weights(batch.mask, c.aggregate, config.rollout.max_new_tokens)
        share = token_weights(batch.mask)
        # Summed up where they lie, layer by layer: there is one array as large as the weights, not one for
        # the prefixes, one for the branches, and their sum.
        sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

        def accumulate(carry, microbatch):
            _, backward, (means, gap) = jax.vjp(
                lambda params: microbatch_loss(params, base, *microbatch), params, has_aux=True
            )
            backward.with_refs(sums)(jnp.float32(1))
            total, widest = carry
            return (jax.tree.map(jnp.add, total, means), jnp.maximum(widest, gap)), None

        microbatches = (batch, weights, share)
        _, start = jax.eval_shape(microbatch_loss, params, base, *jax.tree.map(lambda x: x[0], microbatches))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
        (means, gap), _ = jax.lax.scan(accumulate, start, microbatches)
        grads = train_layout(jax.tree.map(jax.freeze, sums))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(partial(jnp.where, finite), new, (params, opt_state))
        skipped = 1.0 - finite.astype(jnp.float32)
        metrics = {**means, "logprob_diff/max": gap, "grad_norm": grad_norm, "guard/skipped_updates": skipped}
        return params, opt_state, metrics

    return update
