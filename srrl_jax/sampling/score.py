"""Reading the next token's probabilities without sampling it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.models.attention import Segment
from srrl_jax.models.head import token_logprobs
from srrl_jax.models.modules import project
from srrl_jax.models.tree import LaneBatch, last_states
from srrl_jax.parallel import to_host
from srrl_jax.sampling.buckets import plan_waves
from srrl_jax.sampling.sampler import Sampler, Weights, pack


def score(
    sampler: Sampler,
    params: Any,
    prefixes: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    candidates: Sequence[int],
    on_wave: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """Log-probabilities of `candidates` as the token that comes next after each branch.

    The prefill of `Sampler.generate` and nothing more, in the same buckets.

    Args:
      sampler: whose model, buckets and mesh are used.
      params, prefixes, branches, on_wave: as in `Sampler.generate`.
      candidates: C token ids.
    Returns:
      For each row float32 [its branches, C], of the softmax over the whole vocabulary at temperature 1.
    Raises:
      InputError: a row that the bucket table or the memory does not hold; nothing has run by then.
    """
    plan = sampler.plan(prefixes, branches)
    waves = plan_waves(plan.lengths, plan.buckets)
    params = params.params if isinstance(params, Weights) else params
    trunk, _ = sampler.begin(params, plan.trunk)
    results: list[np.ndarray] = [np.zeros((0, len(candidates)), np.float32)] * len(prefixes)
    total, done = sum(map(len, branches)), 0
    ids = jnp.asarray(candidates, jnp.int32)
    for wave in waves:
        tree, _ = pack(wave, plan, branches, range(len(prefixes)))
        logprobs = to_host(next_logprobs(sampler.graphdef, params, sampler._place(tree), ids, trunk))
        for place, row in enumerate(wave.indices):
            if row < 0:
                continue
            results[row] = logprobs[place, : len(branches[row])]
            done += len(branches[row])
        on_wave(done, total)
    return results


@partial(jax.jit, static_argnames=("graphdef",))
def next_logprobs(
    graphdef, params, tree: LaneBatch, candidates: jax.Array, trunk: Segment | None = None
) -> jax.Array:
    """float32 [N, B, C]."""
    model = nnx.merge(graphdef, params)
    state, _, _ = last_states(model, tree, trunk)
    # That of one candidate is of the whole vocabulary; the others differ from it by their logits.
    first = jnp.broadcast_to(candidates[0], (*state.shape[:2], 1))
    whole, _ = token_logprobs(state[:, :, None], model.head, first)
    logits = project(state, model.head[candidates], jnp.float32)
    return whole + logits - logits[..., :1]
