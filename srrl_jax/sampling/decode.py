"""The two jitted programs of sampling: prefill and decode."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.models.attention import Segment
from srrl_jax.models.tree import TreeBatch, last_states
from srrl_jax.sampling.tokens import choose


class Decoded(NamedTuple):
    """New tokens int32 and log-probabilities float32 [N, B, M]; lengths int32 and stopped bool [N, B].

    A length counts the stop token; a branch that never stopped has length M.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array


@partial(jax.jit, static_argnames=("graphdef", "new_tokens"))
def prefill(graphdef, params, tree: TreeBatch, *, new_tokens: int) -> tuple[jax.Array, Segment, Segment]:
    """Runs the prefixes once and the branches' given tokens on top of them.

    Returns:
      The states [N, B, hidden] that predict each branch's first new token; the prefixes' keys and
      values, shared by a row's branches; and the branches' own, with room for the new tokens.
    """
    model = nnx.merge(graphdef, params)
    state, prefix, own = last_states(model, tree)
    if own is None:
        layers, n, k, _, _, d = prefix.k.shape
        b = tree.branches.shape[1]
        empty = jnp.zeros((layers, n, k, b, 0, d), prefix.k.dtype)
        own = Segment(empty, empty, jnp.zeros((n, b, 1, 0), bool), jnp.zeros((n, b, 0), jnp.int32))
    room = [(0, 0)] * 4 + [(0, new_tokens), (0, 0)]
    mask = jnp.pad(own.mask, [(0, 0)] * 3 + [(0, new_tokens)])
    new = _first_position(tree)[..., None] + jnp.arange(new_tokens)
    positions = jnp.concatenate([own.positions, new], axis=-1)
    return state, prefix, Segment(jnp.pad(own.k, room), jnp.pad(own.v, room), mask, positions)


def _first_position(tree: TreeBatch) -> jax.Array:
    """Of each branch's first new token [N, B]; its key lies further on, after the branch's padding."""
    return tree.prefix_lengths[:, None] + tree.branch_lengths


class _Loop(NamedTuple):
    step: jax.Array
    last: jax.Array  # the newest token of each branch [N, B]
    own: Segment
    out: Decoded


@partial(
    jax.jit,
    static_argnames=("graphdef", "new_tokens", "top_k", "truncates"),
    donate_argnames=("own",),
)
def decode(
    graphdef,
    params,
    state: jax.Array,
    prefix: Segment,
    own: Segment,
    tree: TreeBatch,
    keys: jax.Array,
    active: jax.Array,
    stop_ids: jax.Array,
    sampling: tuple[jax.Array, jax.Array, jax.Array],
    *,
    new_tokens: int,
    top_k: int,
    truncates: bool,
    allowed: jax.Array,
) -> tuple[Decoded, Segment]:
    """Samples until every branch has stopped or holds `new_tokens`.

    Args:
      state, prefix, own: what `prefill` returned; `own` is donated and comes back filled, so that
        its buffers are written in place.
      keys: a random key for each branch [N, B]; the i-th token is drawn with fold_in(key, i), so it
        does not depend on what else is in the batch.
      active: bool [N, B], false at padding, which counts as stopped from the start.
      stop_ids: int [S]; any of them ends a branch.
      sampling: temperature, top_p, min_p; see `choose` for the rest.
    """
    model = nnx.merge(graphdef, params)
    temperature, top_p, min_p = sampling
    given = tree.branches.shape[-1]
    start = _first_position(tree)

    def draw(state, step):
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))(keys)
        return choose(
            model.logits(state),
            step_keys,
            temperature,
            top_p,
            min_p,
            top_k=top_k,
            truncates=truncates,
            allowed=allowed,
        )

    def record(out: Decoded, token, logprob, step) -> Decoded:
        alive = ~out.stopped
        return Decoded(
            out.tokens.at[:, :, step].set(jnp.where(alive, token, 0)),
            out.logprobs.at[:, :, step].set(jnp.where(alive, logprob, 0.0)),
            out.lengths + alive,
            out.stopped | (token[..., None] == stop_ids).any(-1),
        )

    def more_to_do(loop: _Loop):
        return (loop.step < new_tokens) & ~loop.out.stopped.all()

    def one_token(loop: _Loop) -> _Loop:
        slot = loop.step - 1
        state, (k, v) = model.extend(
            loop.last[..., None],
            (start + slot)[..., None],
            jnp.ones((*loop.last.shape, 1), bool),
            [prefix, loop.own],
        )
        at = (0, 0, 0, 0, given + slot, 0)
        own = loop.own._replace(
            k=jax.lax.dynamic_update_slice(loop.own.k, k, at),
            v=jax.lax.dynamic_update_slice(loop.own.v, v, at),
            mask=loop.own.mask.at[..., given + slot].set(True),
        )
        token, logprob = draw(state[:, :, 0], loop.step)
        return _Loop(loop.step + 1, token, own, record(loop.out, token, logprob, loop.step))

    shape = (*tree.branch_lengths.shape, new_tokens)
    out = Decoded(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape[:2], jnp.int32), ~active,
    )  # fmt: skip
    token, logprob = draw(state, 0)
    first = _Loop(jnp.int32(1), token, own, record(out, token, logprob, 0))
    end = jax.lax.while_loop(more_to_do, one_token, first)
    return end.out, end.own
