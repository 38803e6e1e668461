"""The programs of sampling on the device: rows enter the caches, and their branches are decoded."""

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.kernels.int8 import quantize
from srrl_jax.kernels.packed import Pack, sequence
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.head import token_logprobs
from srrl_jax.models.modules import project
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.parallel import platform, rollout_layout, row_shards
from srrl_jax.parallel.mesh import mesh_axes
from srrl_jax.sampling.decoder import (
    BranchCache,
    Decoder,
    KeysValues,
    PrefixCache,
    gather_per_shard,
    layers_are_unstacked,
    stacks_of,
)
from srrl_jax.sampling.shapes import Shapes
from srrl_jax.sampling.tokens import choose

# Of decoding, whose products that share an input are joined already: cuBLAS's were measured to be faster for
# few rows than the kernels that XLA makes, which leave sums of parts to others.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
ANY_KEY = jax.eval_shape(lambda: jax.random.key(0))


def steps_per_sync() -> int:
    """Decode steps between two checks of whether any slot is alive; a GPU waits for its host at each."""
    return 8 if platform() == "gpu" else 1


class DecodeState(NamedTuple):
    """State of decoding on the device: caches of prefixes and branches, and of each slot what comes next.

    Of each of the S slots: `keys` random keys; `drawn` int32, tokens drawn so far; `last` int32, the newest
    token, not yet in the cache; `alive` bool, false in a slot that is free or has finished.
    """

    prefixes: PrefixCache
    branches: BranchCache
    keys: jax.Array
    drawn: jax.Array
    last: jax.Array
    alive: jax.Array


class Sampled(NamedTuple):
    """Tokens int32 and log-probabilities float32 [S, C]; how many each slot drew int32, alive bool [S]."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    alive: jax.Array


class SamplingParams(NamedTuple):
    """Sampling parameters and stop conditions, as traced arrays, so that a change does not recompile.

    `stop_ids` int32 [any], each of which ends a branch; `limit` int32, its most tokens; for the rest see
    `choose`.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    allowed: jax.Array
    stop_ids: jax.Array
    limit: jax.Array


class Arrivals(NamedTuple):
    """Rows that enter, a pack for each of R shards; up to n rows of a pack, with up to B branches.

    `last`, the newest token of each branch, is not in the pack.

    Shapes: `begins` int32 [R, n], the place of a row's first token, T where there is no row; `lengths` int32
    [R, n], of its prefix; `first`, `ends` int32 [R, n, B], from where to before where the row holds what a
    branch is given; `last` int32 [R, n, B]; `ids` uint32 [R, n], the rows' numbers that random keys are
    folded from.
    """

    pack: Pack
    begins: jax.Array
    lengths: jax.Array
    first: jax.Array
    ends: jax.Array
    last: jax.Array
    ids: jax.Array


class Admission(NamedTuple):
    """Which cache rows and slots the newly prefilled rows and branches take; -1 keeps the old content.

    `places` int32 [R, n]: of each arrived row, in the cache of its shard. `rows` int32 [R, N / R] and
    `branches` int32 [R, S / R]: the arrived row, or the cell of the arrived branch, that comes here; `slots`
    and `cells`: of `PrefixCache` and `BranchCache`, as they are to be.
    """

    places: jax.Array
    rows: jax.Array
    branches: jax.Array
    slots: jax.Array
    cells: jax.Array


class Programs(NamedTuple):
    """The jitted programs of a sampler, with all that is static bound to them.

    `places` are where the arrays of a `DecodeState` lie, `shared_places` those of what `begin` makes; None
    without a mesh.
    """

    prepare: Callable
    begin: Callable
    empty: Callable
    enter: Callable
    decode: Callable
    score: Callable
    places: DecodeState | None
    shared_places: tuple[tuple, KeysValues] | None


@functools.cache  # so that samplers alike share what was compiled
def make_programs(
    graphdef: nnx.GraphDef,
    decoder: nnx.GraphDef,
    layout: Any,
    config: Qwen3Config,
    shapes: Shapes,
    mesh: jax.sharding.Mesh | None,
    dtype: jnp.dtype,
    int8: tuple[bool, bool],
    chunk: int,
    top_k: int,
    truncates: bool,
) -> Programs:
    """The programs of a sampler. Under `jax.set_mesh` of the mesh.

    Args:
      graphdef, decoder: of the model, and of its `Decoder`.
      layout: the tree of what `prepare` makes; `decode` takes its leaves alone, which a call finds sooner.
      dtype: of the caches, unless they are of 8 bits.
      int8: whether weights, and caches, are decoded in 8 bits.
      chunk: most tokens that a run of `decode` draws.
      top_k, truncates: see `choose`.
    """
    cached = partial(_cached, config, dtype=dtype, int8=int8[1])

    def prefill_shared(params, tokens):
        _, kv = nnx.merge(graphdef, params).prefill(sequence(tokens))
        return kv, cached(kv)

    def empty_caches(key):
        return _empty(key, config, shapes, 1 if mesh is None else row_shards(mesh), cached)

    def prefill_rows(params, shared, state, arrivals, admission, key):
        start = shared[0].shape[2] if shared else 0
        _, kv = nnx.merge(graphdef, params).prefill(arrivals.pack, shared)
        return _admit(cached(kv), state, arrivals, admission, key, start)

    def decode(weights, shared, state, rule, exit_threshold, width):
        model, kv = nnx.merge(decoder, jax.tree.unflatten(layout, weights)), state.branches.kv
        if width == shapes.own:
            return _decode(model, shared, state, rule, exit_threshold, chunk, top_k, truncates)
        state = state._replace(branches=state.branches._replace(kv=_columns(kv, width)))
        out, state = _decode(model, shared, state, rule, exit_threshold, chunk, top_k, truncates)
        back = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice(x, y, [0] * x.ndim), kv, state.branches.kv
        )
        return out, state._replace(branches=state.branches._replace(kv=back))

    def score(params, shared, arrivals, candidates):
        return _score(nnx.merge(graphdef, params), shared, arrivals, candidates)

    everywhere = places = shared_places = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, P())
        heads = mesh_axes("kv_heads", config.num_key_value_heads) or None
        whole = NamedSharding(mesh, P(None, None, None, heads))
        cached_whole = NamedSharding(mesh, P(*[None] * (1 if layers_are_unstacked() else 2), heads))
        shared_places = (whole, whole), KeysValues(cached_whole, cached_whole)
        places = _places(jax.eval_shape(empty_caches, ANY_KEY), mesh)
    return Programs(
        prepare=_make_prepare(graphdef, mesh, int8[0]),
        begin=jax.jit(prefill_shared, out_shardings=shared_places),
        empty=jax.jit(empty_caches, out_shardings=places),
        enter=jax.jit(prefill_rows, out_shardings=places, donate_argnums=2),
        decode=jax.jit(
            decode,
            static_argnames="width",
            out_shardings=None if mesh is None else (everywhere, places),
            donate_argnums=2,
            compiler_options=None if int8[0] or platform() != "gpu" else _GPU_OPTIONS,
        ),
        score=jax.jit(score),
        places=places,
        shared_places=shared_places,
    )


@functools.cache  # one for all samplers of a model
def _make_prepare(graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh | None, int8: bool) -> Callable:
    def prepare_weights(params, replaces):
        state = nnx.state(Decoder(nnx.merge(graphdef, params), int8))
        return state if mesh is None else rollout_layout(state, mesh)

    return jax.jit(prepare_weights, donate_argnums=1, keep_unused=True)


def _cached(config: Qwen3Config, kv: tuple[jax.Array, jax.Array], dtype: jnp.dtype, int8: bool) -> KeysValues:
    """Keys and values, each [layers, A, T, K, D], as the caches keep them, in the stacks of a `Decoder`."""
    apart = layers_are_unstacked()

    def stacks(x, *axes, axis):
        x = x.transpose(0, 1, *axes)
        x = quantize(x, axis) if int8 else x.astype(dtype)
        places = [run.start if apart else run for _, _, run in stacks_of(config.has_experts)]
        return tuple(jax.tree.map(operator.itemgetter(place), x) for place in places)

    return KeysValues(stacks(kv[0], 3, 4, 2, axis=-2), stacks(kv[1], 3, 2, 4, axis=-1))


def _empty(key, c: Qwen3Config, shapes: Shapes, shards: int, cached) -> DecodeState:
    """Nothing runs yet. Any typed `key` will do: it is of the kind of keys to come."""

    def caches(count, tokens):
        shape = (c.num_hidden_layers, count, tokens, c.num_key_value_heads, c.head_dim)
        kv = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
        # Their shapes alone: XLA would round zeros for seconds while it compiles.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(cached, kv))

    def numbers(*shape):
        return jnp.zeros(shape, jnp.int32)

    rows, slots = shapes.rows, shapes.slots
    prefixes = PrefixCache(
        caches(rows, shapes.row),
        numbers(rows),
        numbers(rows, shapes.fan_out),
        numbers(rows, shapes.fan_out),
        numbers(shards, rows * shapes.fan_out // shards),
    )
    branches = BranchCache(
        caches(slots, shapes.own),
        numbers(slots),
        numbers(slots),
        numbers(shards, slots // shards),
        jnp.int32(0),
    )
    keys = jax.random.split(key, slots)
    return DecodeState(prefixes, branches, keys, numbers(slots), numbers(slots), jnp.zeros(slots, bool))


def _columns(kv: KeysValues, width: int) -> KeysValues:
    """The first columns of a cache, which hold all its tokens while these do not go round its ring."""

    def cut(x, axis):
        return jax.lax.slice_in_dim(x, 0, width, axis=x.ndim + axis)

    return KeysValues(*(jax.tree.map(partial(cut, axis=axis), x) for x, axis in ((kv.k, -1), (kv.v, -2))))


def _places(state: DecodeState, mesh: jax.sharding.Mesh) -> DecodeState:
    """Where each array of the state lies: rows and slots are cut as rows of a batch, heads over tensor."""

    def place(x, *axes):
        names = [mesh_axes(axis, size) or None for axis, size in zip(axes, x.shape, strict=False)]
        return NamedSharding(mesh, P(*names))

    def cache(x):
        return place(x, *[None] * (x.ndim - 4), "batch", "kv_heads")

    def cut(x):
        return place(x, "batch") if x.ndim else NamedSharding(mesh, P())

    def parts(part):
        return jax.tree.map(cut, part)._replace(kv=jax.tree.map(cache, part.kv))

    rest = jax.tree.map(cut, state)
    return rest._replace(prefixes=parts(state.prefixes), branches=parts(state.branches))


def _admit(
    new: KeysValues, state: DecodeState, arrivals: Arrivals, admission: Admission, key: jax.Array, start: int
) -> DecodeState:
    """Puts rows that were prefilled into the cache, and their branches into slots.

    Args:
      new: keys and values of the packs, as the caches keep them.
      key: token i of branch b of a row is drawn with the key folded with (the row's number, b, i).
      start: tokens that all rows begin with, computed before.
    """
    prefixes, branches = state.prefixes, state.branches
    b = arrivals.last.shape[-1]

    def place(index, new, old):
        chosen = index.reshape(-1) >= 0
        new = gather_per_shard(new, jnp.maximum(index, 0))
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def of_rows(new, old):
        return place(admission.rows, new.reshape(-1, *new.shape[2:]), old)

    prefixes = PrefixCache(
        write_rows(prefixes.kv, new, arrivals, admission.places),
        of_rows(arrivals.lengths, prefixes.lengths),
        of_rows(arrivals.first, prefixes.first),
        of_rows(arrivals.ends, prefixes.ends),
        admission.slots,
    )
    positions = start + arrivals.lengths[..., None] + arrivals.ends - arrivals.first
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, arrivals.ids.reshape(-1))
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(b))
    here = admission.branches.reshape(-1) >= 0
    return DecodeState(
        prefixes,
        branches._replace(
            lengths=jnp.where(here, 0, branches.lengths),
            positions=place(admission.branches, positions.reshape(-1), branches.positions),
            cells=admission.cells,
        ),
        place(admission.branches, keys.reshape(-1), state.keys),
        jnp.where(here, 0, state.drawn),
        place(admission.branches, arrivals.last.reshape(-1), state.last),
        state.alive | here,
    )


def write_rows(cache: KeysValues, new: KeysValues, arrivals: Arrivals, places: jax.Array) -> KeysValues:
    """The cache of rows with those of a pack, on each shard; what lies behind a row means nothing.

    Args:
      places: see `Admission`.
    """
    one_shard = _scatter_tokens if platform() == "gpu" else _copy_rows
    if not jax.sharding.get_abstract_mesh().empty:
        heads = cache.v[0].shape[-3]
        cut = mesh_axes("batch", len(places)) or None, mesh_axes("kv_heads", heads) or None
        caches = P(*[None] * (0 if layers_are_unstacked() else 1), *cut)
        one_shard = jax.shard_map(
            one_shard,
            in_specs=(caches, caches, P(cut[0]), P(cut[0]), P(cut[0])),
            out_specs=caches,
            check_vma=False,
        )
    return one_shard(cache, new, arrivals.begins, arrivals.pack.positions, places)


def _copy_rows(cache: KeysValues, new: KeysValues, begins, positions, places) -> KeysValues:
    """Row by row, each as long as the longest."""
    size = cache.v[0].shape[-2]

    def padded(x, axis):  # so that no slice is moved for want of tokens
        return jnp.pad(x, [(0, size if i == x.ndim + axis else 0) for i in range(x.ndim)])

    def put(i, cache):
        def one(old, new, axis):
            row = jax.lax.dynamic_slice_in_dim(new, begins[0, i], size, new.ndim + axis)
            return jax.lax.dynamic_update_slice_in_dim(old, row, places[0, i], old.ndim - 4)

        return KeysValues(
            *(jax.tree.map(partial(one, axis=a), *x) for a, *x in zip(axes, cache, new, strict=True))
        )

    axes = -1, -2  # of tokens, in keys and in values
    new = KeysValues(*(jax.tree.map(partial(padded, axis=a), x) for a, x in zip(axes, new, strict=True)))
    return jax.lax.fori_loop(0, (places[0] >= 0).sum(), put, cache)


def _scatter_tokens(cache: KeysValues, new: KeysValues, begins, positions, places) -> KeysValues:
    """Token by token, all at once: a GPU's host would have to start each round of a loop."""
    token = jnp.arange(positions.shape[1])
    row = jnp.searchsorted(begins[0], token, side="right") - 1
    size = cache.v[0].shape[0]
    place = jnp.where(positions[0] >= 0, places[0, row], size + token)  # padding goes nowhere
    column = token - begins[0, row]
    write = dict(mode="drop", unique_indices=True)

    def keys(old, new):  # [N, K, D, P], [1, K, D, T]
        return old.at[place, :, :, column].set(new[0].transpose(2, 0, 1), **write)

    def values(old, new):  # [N, K, P, D], [1, K, T, D]
        return old.at[place, :, column].set(new[0].swapaxes(0, 1), **write)

    return KeysValues(jax.tree.map(keys, cache.k, new.k), jax.tree.map(values, cache.v, new.v))


def _decode(
    model: Decoder,
    shared: KeysValues,
    state: DecodeState,
    rule: SamplingParams,
    exit_threshold: jax.Array,
    chunk: int,
    top_k: int,
    truncates: bool,
) -> tuple[Sampled, DecodeState]:
    """Draws up to `chunk` tokens in every slot that is alive.

    Args:
      exit_threshold: int scalar; ends early when no more than this many slots of any shard are alive.
    """
    size, shards = state.alive.shape[0], state.branches.cells.shape[0]

    def more_to_do(loop):
        step, state, _ = loop
        return (step < chunk) & (state.alive.reshape(shards, -1).sum(1).max() > exit_threshold)

    def one_token(loop):
        step, state, out = loop
        hidden, branches = model.step(state.last, state.alive, shared, state.prefixes, state.branches)
        token, logprob = choose(
            model.logits(hidden),
            jax.vmap(jax.random.fold_in)(state.keys, state.drawn),
            rule.temperature,
            rule.top_p,
            rule.min_p,
            top_k=top_k,
            truncates=truncates,
            allowed=rule.allowed,
        )
        alive, drawn = state.alive, state.drawn + state.alive
        ends = (token[:, None] == rule.stop_ids).any(-1) | (drawn >= rule.limit)
        out = Sampled(
            jax.lax.dynamic_update_slice(out.tokens, jnp.where(alive, token, 0)[:, None], (0, step)),
            jax.lax.dynamic_update_slice(out.logprobs, jnp.where(alive, logprob, 0.0)[:, None], (0, step)),
            out.counts + alive,
            alive & ~ends,
        )
        return step + 1, state._replace(branches=branches, drawn=drawn, last=token, alive=out.alive), out

    nothing = Sampled(
        jnp.zeros((size, chunk), jnp.int32), jnp.zeros((size, chunk), jnp.float32),
        jnp.zeros(size, jnp.int32), state.alive,
    )  # fmt: skip

    def some_tokens(loop):
        return jax.lax.fori_loop(0, steps_per_sync(), lambda _, loop: one_token(loop), loop)

    _, state, out = jax.lax.while_loop(more_to_do, some_tokens, (jnp.int32(0), state, nothing))
    return out, state


def _score(model: Qwen3, shared: tuple, arrivals: Arrivals, candidates: jax.Array) -> jax.Array:
    """Log-probabilities float32 [R, n, B, C] of the candidates, each as the next token of a branch."""
    hidden, _ = model.prefill(arrivals.pack, shared, states=True)
    own = arrivals.ends > arrivals.first
    last = arrivals.begins[..., None] + jnp.where(own, arrivals.ends, arrivals.lengths[..., None]) - 1
    shape = last.shape
    last = jnp.clip(last.reshape(len(last), -1), 0, hidden.shape[1] - 1)
    last = jnp.take_along_axis(hidden, last[..., None], axis=1)  # [R, n * B, hidden]
    # That of one candidate is of the whole vocabulary; the others differ from it by their logits.
    first = jnp.broadcast_to(candidates[0], (*last.shape[:2], 1))
    whole, _ = token_logprobs(last[:, :, None], model.head, first)
    logits = project(last, model.head[candidates], jnp.float32)
    return (whole + logits - logits[..., :1]).reshape(*shape, -1)
