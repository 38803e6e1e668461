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

from srrl_jax.models.attention import Segment, platform
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.head import token_logprobs
from srrl_jax.models.int8 import quantize
from srrl_jax.models.modules import project
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.models.tree import LaneBatch, extend_shared, prefill
from srrl_jax.parallel import rollout_layout, row_shards
from srrl_jax.parallel.mesh import mesh_axes
from srrl_jax.sampling.decoder import (
    BranchCache,
    Cache,
    Decoder,
    KeysValues,
    PrefixCache,
    layers_lie_apart,
    pick,
    stacks_of,
)
from srrl_jax.sampling.shapes import Shapes
from srrl_jax.sampling.tokens import choose

# Of decoding, whose products that share an input are joined already: cuBLAS's were measured to be faster for
# few rows than the kernels that XLA makes, which leave sums of parts to others.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
ANY_KEY = jax.eval_shape(lambda: jax.random.key(0))


def look_every() -> int:
    """Tokens between two looks at whether any slot is alive: a GPU's host would have to wait for each."""
    return 8 if platform() == "gpu" else 1


class DecodeState(NamedTuple):
    """What the engine has on the device between two programs.

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


class Arrivals(NamedTuple):
    """Rows that enter: `batch`, their tokens but the last of each branch, which is in `last` int32 [n, B];
    `ids` uint32 [n], the numbers of the rows that random keys are folded from."""

    batch: LaneBatch
    last: jax.Array
    ids: jax.Array


class Admission(NamedTuple):
    """Where arrivals go, by shard of the mesh; -1 leaves what is there.

    `rows` int32 [R, N / R] and `branches` int32 [R, S / R]: the arrived row, or the cell of the arrived
    branch, that comes here; `slots` and `cells`: of `PrefixCache` and `BranchCache`, as they are to be.
    """

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
    shared_places: tuple[Segment, KeysValues] | None


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
    cached = partial(_cached, dtype=dtype, int8=int8[1])

    def prefill_shared(params, tokens):
        segment = extend_shared(nnx.merge(graphdef, params), tokens)
        k, v = segment.k[:, :, :, 0].swapaxes(3, 4), segment.v[:, :, :, 0]
        return segment, _stacked(config, cached(k, axis=-2), cached(v, axis=-1))

    def empty_caches(key):
        return _empty(key, config, shapes, 1 if mesh is None else row_shards(mesh), cached)

    def prefill_rows(params, shared, state, arrivals, admission, key):
        start = 0 if shared is None else shared.k.shape[-2]
        prefix, lanes, _ = prefill(nnx.merge(graphdef, params), arrivals.batch, shared)
        return _admit(config, cached, state, prefix, lanes, arrivals, admission, key, start)

    def decode(weights, shared, state, rule, enough, width):
        model, kv = nnx.merge(decoder, jax.tree.unflatten(layout, weights)), state.branches.kv
        if width == shapes.own:
            return _decode(model, shared, state, rule, enough, chunk, top_k, truncates)
        state = state._replace(branches=state.branches._replace(kv=_columns(kv, width)))
        out, state = _decode(model, shared, state, rule, enough, chunk, top_k, truncates)
        back = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice(x, y, [0] * x.ndim), kv, state.branches.kv
        )
        return out, state._replace(branches=state.branches._replace(kv=back))

    def score(params, shared, batch, candidates):
        return _score(nnx.merge(graphdef, params), shared, batch, candidates)

    everywhere = places = shared_places = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, P())
        heads = mesh_axes("kv_heads", config.num_key_value_heads) or None
        whole = NamedSharding(mesh, P(None, None, heads))
        cached_whole = NamedSharding(mesh, P(None, heads)) if layers_lie_apart() else whole
        shared_places = (
            Segment(whole, whole, everywhere, everywhere),
            KeysValues(cached_whole, cached_whole),
        )
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


def _cached(x: jax.Array, axis: int, dtype: jnp.dtype, int8: bool) -> Cache:
    """Keys or values as the caches keep them; `axis` is that of the head dimension."""
    return quantize(x, axis) if int8 else x.astype(dtype)


def _stacked(config: Qwen3Config, k: Cache, v: Cache) -> KeysValues:
    """Keys and values [layers, ...] in the stacks of a `Decoder`."""
    apart = layers_lie_apart()

    def stacks(cache):
        places = [run.start if apart else run for _, _, run in stacks_of(config.has_experts)]
        return tuple(jax.tree.map(operator.itemgetter(place), cache) for place in places)

    return KeysValues(stacks(k), stacks(v))


def _empty(key, c: Qwen3Config, shapes: Shapes, shards: int, cached) -> DecodeState:
    """Nothing runs yet. Any typed `key` will do: it is of the kind of keys to come."""

    def caches(count, tokens):
        def zeros(*last, axis):
            shape = jax.ShapeDtypeStruct(
                (c.num_hidden_layers, count, c.num_key_value_heads, *last), jnp.float32
            )
            # Their shapes alone: XLA would round zeros for seconds while it compiles.
            return jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(partial(cached, axis=axis), shape)
            )

        return _stacked(c, zeros(c.head_dim, tokens, axis=-2), zeros(tokens, c.head_dim, axis=-1))

    rows, slots = shapes.rows, shapes.slots
    none = jnp.zeros(slots, jnp.int32)
    cells = jnp.zeros((shards, rows * shapes.fan_out // shards), jnp.int32)
    prefixes = PrefixCache(caches(rows, shapes.prefix), jnp.zeros(rows, jnp.int32), cells)
    own = jnp.zeros((shards, slots // shards), jnp.int32)
    # Not before the longest that may be given, so that nothing lies around the corner of the ring at first.
    end = jnp.int32(shapes.prefill[-1].lane)
    branches = BranchCache(caches(slots, shapes.own), none, none, own, end)
    return DecodeState(prefixes, branches, jax.random.split(key, slots), none, none, jnp.zeros(slots, bool))


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
    config: Qwen3Config,
    cached,
    state: DecodeState,
    prefix: Segment,
    lanes: Segment | None,
    arrivals: Arrivals,
    admission: Admission,
    key: jax.Array,
    start: int,
) -> DecodeState:
    """Puts rows that `prefill` has computed into the caches, and their branches into slots.

    Args:
      key: token i of branch b of a row is drawn with the key folded with (the row's number, b, i).
      start: tokens that all prefixes begin with, computed before.
    """
    batch, prefixes, branches = arrivals.batch, state.prefixes, state.branches
    n, b = batch.lengths.shape

    def place(index, new, old):
        chosen = index.reshape(-1) >= 0
        new = pick(new, jnp.maximum(index, 0))
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def scatter(index, new, old):
        """`place`, written where it goes: a GPU would else copy all of the caches for each prefill."""

        def one_shard(index, new, old):
            goes = jnp.full(len(new), len(old)).at[jnp.where(index < 0, len(new), index)]
            goes = goes.set(jnp.arange(len(old)), mode="drop")
            return old.at[goes].set(new, mode="drop", unique_indices=True)

        new, parts = (x.reshape(len(index), -1, *x.shape[1:]) for x in (new, old))
        return jax.vmap(one_shard)(index, new, parts).reshape(old.shape)

    def put(index, k, v, old: KeysValues) -> KeysValues:
        """Keys and values [layers, n, K, T, D]."""
        one = partial(scatter if platform() == "gpu" else place, index)
        new = _stacked(config, cached(k.swapaxes(-1, -2), axis=-2), cached(v, axis=-1))
        return jax.tree.map(lambda x, y: one(x, y) if x.ndim == 4 else jax.vmap(one)(x, y), new, old)

    def padded(x):  # [layers, n, K, 1, P, D]
        size = prefixes.kv.v[0].shape[-2]
        return jnp.pad(x[:, :, :, 0], [(0, 0)] * 3 + [(0, size - x.shape[-2]), (0, 0)])

    prefixes = PrefixCache(
        put(admission.rows, padded(prefix.k), padded(prefix.v), prefixes.kv),
        place(admission.rows, batch.prefix_lengths, prefixes.lengths),
        admission.slots,
    )
    if lanes is not None:
        width = branches.kv.v[0].shape[-2]
        # Each column of the ring holds one of a branch's tokens, the last of them right before `end`.
        number = batch.lengths[..., None] - 1 - (branches.end - 1 - jnp.arange(width)) % width  # [n, B, W]
        at = jnp.clip(batch.first[..., None] + number, 0, batch.lanes[0].size - 1).reshape(1, n, 1, -1, 1)

        def in_columns(x):  # [layers, n, K, J, L, D] -> [layers, n * B, K, W, D]
            x = jnp.take_along_axis(x.reshape(*x.shape[:3], -1, x.shape[-1]), at, axis=3)
            x = x.reshape(*x.shape[:3], b, width, -1).swapaxes(2, 3)
            return x.reshape(len(x), n * b, *x.shape[3:])

        kv = put(admission.branches, in_columns(lanes.k), in_columns(lanes.v), branches.kv)
        branches = branches._replace(kv=kv)
    lengths = batch.lengths.reshape(-1)
    positions = start + jnp.repeat(batch.prefix_lengths, b) + lengths
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, arrivals.ids)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(b))
    here = admission.branches.reshape(-1) >= 0
    return DecodeState(
        prefixes,
        branches._replace(
            lengths=place(admission.branches, lengths, branches.lengths),
            positions=place(admission.branches, positions, branches.positions),
            cells=admission.cells,
        ),
        place(admission.branches, keys.reshape(-1), state.keys),
        jnp.where(here, 0, state.drawn),
        place(admission.branches, arrivals.last.reshape(-1), state.last),
        state.alive | here,
    )


def _decode(
    model: Decoder,
    shared: KeysValues,
    state: DecodeState,
    rule: SamplingParams,
    enough: jax.Array,
    chunk: int,
    top_k: int,
    truncates: bool,
) -> tuple[Sampled, DecodeState]:
    """Draws up to `chunk` tokens in every slot that is alive.

    Args:
      enough: int scalar; ends early when no more than this many slots of any shard are alive.
    """
    size, shards = state.alive.shape[0], state.branches.cells.shape[0]

    def more_to_do(loop):
        step, state, _ = loop
        return (step < chunk) & (state.alive.reshape(shards, -1).sum(1).max() > enough)

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
        return jax.lax.fori_loop(0, look_every(), lambda _, loop: one_token(loop), loop)

    _, state, out = jax.lax.while_loop(more_to_do, some_tokens, (jnp.int32(0), state, nothing))
    return out, state


def _score(model: Qwen3, shared: Segment | None, batch: LaneBatch, candidates: jax.Array) -> jax.Array:
    """Log-probabilities float32 [N, B, C] of the candidates, each as the next token of a branch."""
    _, _, last = prefill(model, batch, shared, states=True)
    # That of one candidate is of the whole vocabulary; the others differ from it by their logits.
    first = jnp.broadcast_to(candidates[0], (*last.shape[:2], 1))
    whole, _ = token_logprobs(last[:, :, None], model.head, first)
    logits = project(last, model.head[candidates], jnp.float32)
    return whole + logits - logits[..., :1]
