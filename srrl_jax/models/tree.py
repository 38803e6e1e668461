"""Prefixes with branches: the batch layout that rollout, grading and update share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from srrl_jax.models.attention import Segment
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


class LaneBatch(NamedTuple):
    """N prefixes, each continued by B branches that lie one behind the other in J lanes of L places.

    Short branches so share a lane with others, and little is padded to the longest of them.

    Shapes: `prefix` int32 [N, P], `prefix_lengths` int32 [N], `lanes` int32 [N, J, L], `owners` int32
    [N, J, L], the branch of each place (-1: none), `first` int32 [N, B], the place of a branch's first token
    among all J * L, `lengths` int32 [N, B], of its tokens there.
    """

    prefix: jax.Array
    prefix_lengths: jax.Array
    lanes: jax.Array
    owners: jax.Array
    first: jax.Array
    lengths: jax.Array


def _within(lengths: jax.Array, size: int) -> jax.Array:
    """bool [..., size], true at the first `lengths` [...] places."""
    return jnp.arange(size) < lengths[..., None]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [N, B, T, D], index [N, B] -> [N, B, D]."""
    return jnp.take_along_axis(x, index[..., None, None], axis=2)[:, :, 0]


def extend_shared(model: Qwen3, tokens: jax.Array) -> Segment:
    """The keys and values of tokens int32 [T] that every prefix begins with."""
    positions = jnp.arange(tokens.size)[None, None]
    mask = jnp.ones(positions.shape, bool)
    _, (k, v), _ = model.extend(tokens[None, None], positions, mask, states=False, forward_only=True)
    return Segment(k, v, mask[:, :, None], positions)


def extend_prefix(model: Qwen3, tree: TreeBatch, remat: str = "none"):
    """Computes each prefix once.

    Returns:
      The last hidden state [N, hidden], what its branches attend to, and the experts' load.
    """
    hidden, segment, load = _prefix(model, tree, None, remat, states=True, forward_only=False)
    return _at(hidden, tree.prefix_lengths[:, None] - 1)[:, 0], segment, load


def _prefix(model: Qwen3, tree, shared: Segment | None, remat: str, states: bool, forward_only: bool):
    n, p = tree.prefix.shape
    mask = _within(tree.prefix_lengths, p)[:, None]
    start = 0 if shared is None else shared.k.shape[-2]
    positions = jnp.broadcast_to(start + jnp.arange(p), (n, 1, p))
    context = [] if shared is None else [shared]
    hidden, (k, v), load = model.extend(
        tree.prefix[:, None], positions, mask, context, remat, states=states, forward_only=forward_only
    )
    return hidden, Segment(k, v, mask[:, :, None], positions), load


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


def prefill(
    model: Qwen3, batch: LaneBatch, shared: Segment | None = None, states: bool = False
) -> tuple[Segment, Segment | None, jax.Array | None]:
    """Computes prefixes, on top of what all of them begin with, and the lanes on top of them.

    Returns:
      Keys and values of the prefixes, and of the lanes (None without any); with `states` the final hidden
      state [N, B, hidden] of each branch's last token in its lane, of its prefix where it has none there.
    """
    hidden, prefix, _ = _prefix(model, batch, shared, "none", states, forward_only=True)
    (n, b), last = batch.lengths.shape, None
    if states:
        last = _at(hidden, jnp.maximum(batch.prefix_lengths - 1, 0)[:, None])
        last = jnp.broadcast_to(last, (n, b, last.shape[-1]))
    if batch.lanes.size == 0:
        return prefix, None, last
    real = batch.owners >= 0
    place = jnp.arange(batch.lanes[0].size).reshape(batch.lanes.shape[1:])
    begin = jnp.take_along_axis(batch.first, jnp.maximum(batch.owners, 0).reshape(n, -1), axis=1)
    start = 0 if shared is None else shared.k.shape[-2]
    positions = start + batch.prefix_lengths[:, None, None] + place - begin.reshape(batch.lanes.shape)
    context = [prefix] if shared is None else [shared, prefix]
    hidden, (k, v), _ = model.extend(
        batch.lanes, positions, real, context, owners=batch.owners, states=states, forward_only=True
    )
    if states:
        ends = batch.first + jnp.maximum(batch.lengths - 1, 0)
        own = jnp.take_along_axis(hidden.reshape(n, -1, hidden.shape[-1]), ends[..., None], axis=1)
        last = jnp.where(batch.lengths[..., None] > 0, own, last)
    return prefix, Segment(k, v, real[:, :, None], positions), last


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
