"""The jitted programs of sampling: prefill; then admit, decode and resize, on one state of what runs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srrl_jax.models.attention import Segment
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.decoder import Rows, Slots, Trunk, pick, stored
from srrl_jax.models.int8 import quantize
from srrl_jax.models.tree import LaneBatch, extend_trunk, last_states
from srrl_jax.parallel import constrain
from srrl_jax.sampling.tokens import choose


class Running(NamedTuple):
    """Resident prefixes, what all of them continue, and the branches that run on them.

    Of each of the S slots: `keys` random keys; `drawn` int32, tokens drawn so far; `last` int32, the
    newest of them, not yet in the cache; `alive` bool, false in a slot that is free or has finished.
    """

    trunk: Trunk
    rows: Rows
    slots: Slots
    keys: jax.Array
    drawn: jax.Array
    last: jax.Array
    alive: jax.Array


class Drawn(NamedTuple):
    """Tokens int32 and log-probabilities float32 [S, C]; how many each slot drew int32, alive bool [S]."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    alive: jax.Array


class Rule(NamedTuple):
    """How tokens are drawn and when a branch ends, traced: a change does not compile again.

    `stop_ids` int32 [any], each of which ends a branch; `limit` int32, its most tokens; for the rest see
    `choose`.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    allowed: jax.Array
    stop_ids: jax.Array
    limit: jax.Array


class Places(NamedTuple):
    """Where arrivals go, by shard of the mesh; -1 leaves what is there.

    `rows` int32 [R, N / R] and `branches` int32 [R, S / R]: the arrived row, or the cell of the arrived
    branch, that comes here; `slots` and `cells`: of `Rows` and `Slots`, as they are to be.
    """

    rows: jax.Array
    branches: jax.Array
    slots: jax.Array
    cells: jax.Array


class Kept(NamedTuple):
    """What goes on when fewer slots do: the kept `rows` int32 [R, N' / R] and `slots` int32 [R, S' / R] of
    those there were, by shard of the mesh; `grid` and `cells` of `Rows` and `Slots`, as they are to be.
    """

    rows: jax.Array
    slots: jax.Array
    grid: jax.Array
    cells: jax.Array


@partial(jax.jit, static_argnames=("graphdef", "int8"))
def begin(graphdef, params, tokens: jax.Array, int8: bool) -> tuple[Segment, Trunk]:
    """Runs the tokens int32 [T] that all prefixes continue: for `prefill`, and for decoding (in 8 bits or
    the compute type)."""
    segment = extend_trunk(nnx.merge(graphdef, params), tokens)

    def cache(x, axis):  # x [layers, 1, K, 1, T, D]
        parts = [layer[:, :, 0].swapaxes(2, 3) if axis == 2 else layer[:, :, 0] for layer in x]
        return tuple(quantize(part, axis) if int8 else part for part in parts)

    return segment, Trunk(cache(segment.k, 2), cache(segment.v, 3))


@partial(jax.jit, static_argnames=("graphdef",))
def prefill(
    graphdef, params, tree: LaneBatch, trunk: Segment | None = None
) -> tuple[jax.Array, Segment, Segment | None]:
    """Runs the prefixes once, on top of the trunk, and the branches' given tokens on top of them.

    Returns:
      The states [N, B, hidden] that predict each branch's first new token; the prefixes' keys and
      values, shared by a row's branches; and those of the branches' given tokens, in their lanes, None where
      there are none.
    """
    return last_states(nnx.merge(graphdef, params), tree, trunk)


@partial(
    jax.jit,
    static_argnames=("config", "dtype", "int8", "rows", "cells", "slots", "shards", "prefix", "width"),
)
def empty(
    key,
    config: Qwen3Config,
    dtype,
    int8: bool,
    *,
    rows: int,
    cells: int,
    slots: int,
    shards: int,
    prefix: int,
    width: int,
) -> Running:
    """Nothing runs yet: no trunk, N rows of B cells, S slots, room for P prefix tokens and W own ones.

    The caches are of `dtype`, or of 8 bits. Any `key` shows the kind of random keys to come.
    """

    def cache(n, *last, head_axis):
        shape = jax.ShapeDtypeStruct((n, config.num_key_value_heads, *last), dtype)
        # Their shapes alone: XLA would round zeros for seconds while it compiles.
        shapes = jax.eval_shape(partial(quantize, axis=head_axis), shape) if int8 else shape
        zeros = jax.tree.map(
            lambda x: constrain(jnp.zeros(x.shape, x.dtype), "batch", "kv_heads", None, None), shapes
        )
        return (zeros,) * config.num_hidden_layers

    d, none = config.head_dim, jnp.zeros(slots, jnp.int32)
    grid = Rows(
        cache(rows, d, prefix, head_axis=2), cache(rows, prefix, d, head_axis=3), jnp.ones(rows, jnp.int32),
        jnp.zeros((shards, rows * cells // shards), jnp.int32),
    )  # fmt: skip
    own = Slots(
        cache(slots, d, width, head_axis=2), cache(slots, width, d, head_axis=3), none, none,
        jnp.zeros((shards, slots // shards), jnp.int32), jnp.int32(0),
    )  # fmt: skip
    return Running(Trunk(), grid, own, jax.random.split(key, slots), none, none, jnp.zeros(slots, bool))


@partial(jax.jit, static_argnames=("prefix", "width"))
def resize(running: Running, shift: jax.Array, *, prefix: int, width: int) -> Running:
    """Moves own tokens `shift` columns to the left and gives the caches other sizes.

    What falls out at either end must be of no branch any more.
    """

    def along(x, axis, size):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (size, size)
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, pads), size + shift, size, axis)

    def fitted(x, axis):
        if x.shape[axis] >= prefix:
            return jax.lax.slice_in_dim(x, 0, prefix, axis=axis)
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, prefix - x.shape[axis])
        return jnp.pad(x, pads)

    rows, slots = running.rows, running.slots
    rows = rows._replace(
        k=jax.tree.map(lambda x: fitted(x, 3), rows.k),
        v=jax.tree.map(lambda x: fitted(x, 2), rows.v),
    )
    slots = slots._replace(
        k=jax.tree.map(lambda x: along(x, 3, width), slots.k),
        v=jax.tree.map(lambda x: along(x, 2, width), slots.v),
        end=slots.end - shift,
    )
    return running._replace(rows=rows, slots=slots)


@jax.jit
def compact(running: Running, kept: Kept) -> Running:
    """Goes on with fewer rows and slots, whose caches are then less to read."""

    def take(index, tree):
        return jax.tree.map(partial(pick, index=index), tree)

    rows, slots = running.rows, running.slots
    rows = Rows(take(kept.rows, rows.k), take(kept.rows, rows.v), take(kept.rows, rows.lengths), kept.grid)
    own = take(kept.slots, (slots.k, slots.v, slots.lengths, slots.positions))
    others = take(kept.slots, (running.keys, running.drawn, running.last, running.alive))
    return Running(running.trunk, rows, Slots(*own, kept.cells, slots.end), *others)


@partial(jax.jit, static_argnames=("decoder", "top_k", "truncates"), donate_argnames=("running",))
def admit(
    decoder,
    params,
    running: Running,
    state: jax.Array,
    prefix: Segment,
    own: Segment | None,
    tree: LaneBatch,
    keys: jax.Array,
    places: Places,
    rule: Rule,
    *,
    top_k: int,
    truncates: bool,
) -> tuple[jax.Array, jax.Array, Running]:
    """Draws the first token of branches that `prefill` has made ready, and puts them into slots.

    Args:
      decoder, params: graph and state of a `Decoder`.
      state, prefix, own: what `prefill` returned of `tree`.
      keys: a random key for each branch [n, B]; token i is drawn with fold_in(key, i).
    Returns:
      Token and log-probability [n, B] of the branches' first tokens, and what runs now.
    """
    rows, slots = running.rows, running.slots
    n, b = tree.branch_lengths.shape

    def place(index, new, old):
        chosen = index.reshape(-1) >= 0
        new = pick(new, jnp.maximum(index, 0))
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def put(index, new, old, axis):  # new [..., tokens, D]
        new = stored(new.swapaxes(2, 3) if axis == 3 else new, old, axis)
        return jax.tree.map(partial(place, index), new, old)

    def into_rows(new, old, axis):  # new [n, K, 1, P, D]
        new = new[:, :, 0]
        new = jnp.pad(new, [(0, 0), (0, 0), (0, old.shape[axis] - new.shape[2]), (0, 0)])
        return put(places.rows, new, old, axis)

    def into_slots(new, old, axis):  # new [n, K, J, L, D]: from its lane to where the next one is at `end`
        new = new.reshape(n, new.shape[1], -1, new.shape[-1])
        column = jnp.arange(old.shape[axis]) - (slots.end - tree.branch_lengths[..., None])
        at = jnp.clip(tree.first[..., None] + column, 0, new.shape[2] - 1)
        new = jnp.take_along_axis(new, at.reshape(n, 1, -1, 1), axis=2)
        new = new.reshape(n, new.shape[1], b, -1, new.shape[-1]).swapaxes(1, 2)
        return put(places.branches, new.reshape(n * b, *new.shape[2:]), old, axis)

    rows = Rows(
        tuple(into_rows(prefix.k[i], k, 3) for i, k in enumerate(rows.k)),
        tuple(into_rows(prefix.v[i], v, 2) for i, v in enumerate(rows.v)),
        place(places.rows, tree.prefix_lengths, rows.lengths),
        places.slots,
    )
    if own is not None:
        slots = slots._replace(
            k=tuple(into_slots(own.k[i], k, 3) for i, k in enumerate(slots.k)),
            v=tuple(into_slots(own.v[i], v, 2) for i, v in enumerate(slots.v)),
        )
    lengths = tree.branch_lengths.reshape(-1)
    positions = running.trunk.size + jnp.repeat(tree.prefix_lengths, b) + lengths
    slots = slots._replace(
        lengths=place(places.branches, lengths, slots.lengths),
        positions=place(places.branches, positions, slots.positions),
        cells=places.cells,
    )
    token, logprob = _draw(
        nnx.merge(decoder, params), state, keys, jnp.zeros((n, b), jnp.int32), rule, top_k, truncates
    )
    here = places.branches.reshape(-1) >= 0
    last = place(places.branches, token.reshape(-1), running.last)
    running = Running(
        running.trunk,
        rows,
        slots,
        place(places.branches, keys.reshape(-1), running.keys),
        jnp.where(here, 1, running.drawn),
        last,
        jnp.where(here, ~_ends(last, jnp.int32(1), rule), running.alive),
    )
    return _whole(token), _whole(logprob), running


@partial(
    jax.jit,
    static_argnames=("decoder", "chunk", "top_k", "truncates"),
    donate_argnames=("running",),
)
def decode(
    decoder,
    params,
    running: Running,
    rule: Rule,
    enough: jax.Array,
    *,
    chunk: int,
    top_k: int,
    truncates: bool,
) -> tuple[Drawn, Running]:
    """Draws up to `chunk` tokens in every slot that is alive.

    Args:
      decoder, params: graph and state of a `Decoder`.
      running: donated; its caches need room for `chunk` columns from `end` on.
      enough: int scalar; ends early when no more than this many slots of any shard are alive.
    """
    model = nnx.merge(decoder, params)
    size, shards = running.alive.shape[0], running.slots.cells.shape[0]

    def more_to_do(loop):
        step, running, _ = loop
        return (step < chunk) & (running.alive.reshape(shards, -1).sum(1).max() > enough)

    def one_token(loop):
        step, running, out = loop
        state, slots = model.step(running.last, running.alive, running.trunk, running.rows, running.slots)
        token, logprob = _draw(model, state, running.keys, running.drawn, rule, top_k, truncates)
        alive, drawn = running.alive, running.drawn + running.alive
        out = Drawn(
            jax.lax.dynamic_update_slice(out.tokens, jnp.where(alive, token, 0)[:, None], (0, step)),
            jax.lax.dynamic_update_slice(out.logprobs, jnp.where(alive, logprob, 0.0)[:, None], (0, step)),
            out.counts + alive,
            alive & ~_ends(token, drawn, rule),
        )
        return step + 1, running._replace(slots=slots, drawn=drawn, last=token, alive=out.alive), out

    nothing = Drawn(
        jnp.zeros((size, chunk), jnp.int32), jnp.zeros((size, chunk), jnp.float32),
        jnp.zeros(size, jnp.int32), running.alive,
    )  # fmt: skip
    _, running, out = jax.lax.while_loop(more_to_do, one_token, (jnp.int32(0), running, nothing))
    return jax.tree.map(_whole, out), running


def _draw(model, state, keys, number, rule: Rule, top_k: int, truncates: bool):
    """Token and log-probability [...] from states [..., hidden]: draw `number` [...] of each key [...]."""
    fold = jax.random.fold_in
    for _ in number.shape:
        fold = jax.vmap(fold)
    return choose(
        model.logits(state),
        fold(keys, number),
        rule.temperature,
        rule.top_p,
        rule.min_p,
        top_k=top_k,
        truncates=truncates,
        allowed=rule.allowed,
    )


def _ends(token, drawn, rule: Rule) -> jax.Array:
    return (token[..., None] == rule.stop_ids).any(-1) | (drawn >= rule.limit)


def _whole(x: jax.Array) -> jax.Array:
    """On every device: what the host decides by is the same for each process."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P())
