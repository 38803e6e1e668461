"""Prefixes with branches: the batch layout that rollout, grading and update share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from srrl_jax.kernels.segment import Segment
from srrl_jax.models.head import token_logprobs
from srrl_jax.models.qwen3 import Qwen3


class TreeBatch(NamedTuple):
    """N prefixes, each continued by B branches; both padded on the right.

    Shapes: `prefix` int32 [N, P], `prefix_lengths` int32 [N] (at least 1), `branches` int32 [N, B, L],
    `branch_lengths` int32 [N, B].
    """

    prefix: jax.Array
    prefix_lengths: jax.Array
    branches: jax.Array
    branch_lengths: jax.Array


def _within(lengths: jax.Array, size: int) -> jax.Array:
    """bool [..., size], true at the first `lengths` [...] places."""
    return jnp.arange(size) < lengths[..., None]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [N, B, T, D], index [N, B] -> [N, B, D]."""
    return jnp.take_along_axis(x, index[..., None, None], axis=2)[:, :, 0]


def extend_prefix(model: Qwen3, tree: TreeBatch, remat: str = "none"):
    """Computes each prefix once.

    Returns:
      The last hidden state [N, hidden], what its branches attend to, and the experts' load.
    """
    n, p = tree.prefix.shape
    mask = _within(tree.prefix_lengths, p)[:, None]
    positions = jnp.broadcast_to(jnp.arange(p), (n, 1, p))
    hidden, (k, v), load = model.extend(tree.prefix[:, None], positions, mask, remat=remat)
    segment = Segment(k, v, mask[:, :, None], positions)
    return _at(hidden, tree.prefix_lengths[:, None] - 1)[:, 0], segment, load


def extend_branches(model: Qwen3, tree: TreeBatch, context: Segment, remat: str = "none"):
    """Computes the branches on top of their prefix.

    Returns:
      Hidden states [N, B, L, hidden], their K/V segment, and the experts' load.
    """
    size = tree.branches.shape[-1]
    mask = _within(tree.branch_lengths, size)
    positions = tree.prefix_lengths[:, None, None] + jnp.arange(size)
    positions = jnp.broadcast_to(positions, tree.branches.shape)
    hidden, (k, v), load = model.extend(tree.branches, positions, mask, [context], remat=remat)
    return hidden, Segment(k, v, mask[:, :, None], positions), load


def branch_logprobs(
    model: Qwen3, tree: TreeBatch, temperature=1.0, remat: str = "none", return_load: bool = False
):
    """Teacher forcing: log-probability and entropy, float32 [N, B, L], of every branch token.

    Each prefix is computed once, whatever the number of branches. Values at padding mean nothing.
    `return_load` adds the experts' `Load` of all that was computed, prefixes once (None without experts).
    """
    last, context, prefix_load = extend_prefix(model, tree, remat)
    hidden, _, branch_load = extend_branches(model, tree, context, remat)
    n, b, _, d = hidden.shape
    first = jnp.broadcast_to(last[:, None, None], (n, b, 1, d))
    predicting = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    outputs = token_logprobs(predicting, model.head, tree.branches, temperature)
    return (*outputs, jax.tree.map(jnp.add, prefix_load, branch_load)) if return_load else outputs
