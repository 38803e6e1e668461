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

    Shapes: `prefix` int32 [N, P], `prefix_lengths` int32 [N] (at least 1), `lanes` int32 [N, J, L], `owners`
    int32 [N, J, L], the branch of each place (-1: none), `first` int32 [N, B], the place of a branch's first
    token among all J * L, `branch_lengths` int32 [N, B].
    """

    prefix: jax.Array
    prefix_lengths: jax.Array
    lanes: jax.Array
    owners: jax.Array
    first: jax.Array
    branch_lengths: jax.Array


def _within(lengths: jax.Array, size: int) -> jax.Array:
    """bool [..., size], true at the first `lengths` [...] places."""
    return jnp.arange(size) < lengths[..., None]


def _start(trunk: Segment | None) -> int:
    """Position of a prefix's first token."""
    return 0 if trunk is None else trunk.k.shape[-2]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [N, B, T, D], index [N, B] -> [N, B, D]."""
    return jnp.take_along_axis(x, index[..., None, None], axis=2)[:, :, 0]


def extend_trunk(model: Qwen3, tokens: jax.Array) -> Segment:
    """The keys and values of tokens int32 [T] that every prefix continues."""
    positions = jnp.arange(tokens.size)[None, None]
    mask = jnp.ones(positions.shape, bool)
    _, (k, v) = model.extend(tokens[None, None], positions, mask, reads=jnp.zeros((1, 1), jnp.int32))
    return Segment(k, v, mask[:, :, None], positions)


def extend_prefix(
    model: Qwen3,
    tree: TreeBatch | LaneBatch,
    remat: str = "none",
    trunk: Segment | None = None,
    trains: bool = True,
):
    """Computes each prefix once, on top of the trunk if there is one.

    Without `trains` the last layer computes one state a prefix, so it counts no load of the others.

    Returns:
      The last hidden state [N, hidden], what its branches attend to, and the experts' load.
    """
    n, p = tree.prefix.shape
    mask = _within(tree.prefix_lengths, p)[:, None]
    positions = jnp.broadcast_to(_start(trunk) + jnp.arange(p), (n, 1, p))
    context = [] if trunk is None else [trunk]
    ends = tree.prefix_lengths[:, None] - 1
    hidden, (k, v), load = model.extend(
        tree.prefix[:, None],
        positions,
        mask,
        context,
        remat=remat,
        return_load=True,
        reads=None if trains else ends,
    )
    last = (_at(hidden, ends) if trains else hidden)[:, 0]
    return last, Segment(k, v, mask[:, :, None], positions), load


def extend_branches(model: Qwen3, tree: TreeBatch, context: Segment, remat: str = "none"):
    """Computes the branches on top of their prefix.

    Returns:
      Hidden states [N, B, L, hidden], their K/V segment, and the experts' load.
    """
    size = tree.branches.shape[-1]
    mask = _within(tree.branch_lengths, size)
    positions = tree.prefix_lengths[:, None, None] + jnp.arange(size)
    positions = jnp.broadcast_to(positions, tree.branches.shape)
    hidden, (k, v), load = model.extend(
        tree.branches, positions, mask, [context], remat=remat, return_load=True
    )
    return hidden, Segment(k, v, mask[:, :, None], positions), load


def last_states(model: Qwen3, tree: LaneBatch, trunk: Segment | None = None):
    """Prefill: the state [N, B, hidden] that predicts each branch's next token, and both K/V segments.

    The branches' segment is that of their lanes. Empty branches (a rollout) take their prefix's last state;
    without any lane the second segment is None.
    """
    last, prefix, _ = extend_prefix(model, tree, trunk=trunk, trains=False)
    (n, b), hidden = tree.branch_lengths.shape, last.shape[-1]
    last = jnp.broadcast_to(last[:, None], (n, b, hidden))
    if tree.lanes.size == 0:
        return last, prefix, None
    real = tree.owners >= 0
    flat = jnp.arange(tree.lanes[0].size).reshape(tree.lanes.shape[1:])
    begin = jnp.take_along_axis(tree.first, jnp.maximum(tree.owners, 0).reshape(n, -1), axis=1)
    positions = _start(trunk) + tree.prefix_lengths[:, None, None] + flat - begin.reshape(tree.lanes.shape)
    context = [prefix] if trunk is None else [trunk, prefix]
    ends = tree.first + jnp.maximum(tree.branch_lengths - 1, 0)
    own, (k, v) = model.extend(tree.lanes, positions, real, context, owners=tree.owners, reads=ends)
    lanes = Segment(k, v, real[:, :, None], positions)
    return jnp.where(tree.branch_lengths[..., None] > 0, own, last), prefix, lanes


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
