"""The network as it decodes: one token for each running branch, on caches that are written in place.

Layers are apart here and not stacked: each reads its weights and its cache where they lie, while a
scan over stacked ones copies every layer's slice first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.models.attention import NEVER, near
from srrl_jax.models.int8 import Int8, quantize
from srrl_jax.models.qwen3 import Qwen3
from srrl_jax.models.rope import rope
from srrl_jax.parallel import constrain

Cache = jax.Array | Int8  # of shape [...] or, in 8 bits, with a scale for each token and head


class Trunk(NamedTuple):
    """What every prefix continues: `k` a [1, K, D, T] and `v` a [1, K, T, D] for each layer, or no layer."""

    k: tuple[Cache, ...] = ()
    v: tuple[Cache, ...] = ()

    @property
    def size(self) -> int:
        """T."""
        return self.v[0].shape[2] if self.v else 0


class Rows(NamedTuple):
    """Prefixes that running branches continue: N rows with B cells each, over R shards of the mesh.

    Shapes: `k` a [N, K, D, P] and `v` a [N, K, P, D] for each layer; `lengths` int32 [N]; `slots` int32
    [R, N / R * B], which slot of its shard holds the branch of a cell (any, where none does).
    """

    k: tuple[Cache, ...]
    v: tuple[Cache, ...]
    lengths: jax.Array
    slots: jax.Array


class Slots(NamedTuple):
    """The own tokens of S running branches, all aligned so that the next one goes to column `end`.

    Shapes: `k` a [S, K, D, W] and `v` a [S, K, W, D] for each layer; `lengths` int32 [S], tokens in the
    columns before `end`; `positions` int32 [S], of the next token; `cells` int32 [R, S / R], the
    branch's cell among those of its shard; `end` int32.
    """

    k: tuple[Cache, ...]
    v: tuple[Cache, ...]
    lengths: jax.Array
    positions: jax.Array
    cells: jax.Array
    end: jax.Array


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `x` [A, ...] by an index [R, C] into each of its R equal parts -> [R * C, ...].

    Parts are shards of the mesh, so that nothing travels between devices.
    """
    shards, count = index.shape
    parts = x.reshape(shards, -1, *x.shape[1:])
    return jax.vmap(lambda part, i: part[i])(parts, index).reshape(shards * count, *x.shape[1:])


class Decoder(nnx.Module):
    """A Qwen3 with its layers apart, in its compute type: `nnx.state(Decoder(model))` is what decoding
    takes in place of `nnx.state(model)`.

    Args:
      int8: keep the weights of attention and dense MLPs in 8 bits, with a scale for each output; the
        embedding, the head, norms, routers and experts are as they are without.
    """

    def __init__(self, model: Qwen3, int8: bool = False):
        def cast(x):
            return x.astype(model.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        def part(module, layer: int | None = None):
            def take(variable):
                value = variable[...] if layer is None else variable[...][layer]
                taken = variable.replace(cast(value))
                taken.set_metadata(axes=variable.get_metadata()["axes"][-value.ndim :])
                return taken

            graphdef, state = nnx.split(module)
            is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
            return nnx.merge(graphdef, jax.tree.map(take, state, is_leaf=is_leaf))

        self.config, self.dtype = model.config, model.dtype
        self.embed_tokens, self.norm = part(model.embed_tokens), part(model.norm)
        self.lm_head = None if model.lm_head is None else part(model.lm_head)
        kinds = model.config.has_experts
        stacks = [model.moe_layers if experts else model.layers for experts in kinds]
        places = [kinds[:i].count(experts) for i, experts in enumerate(kinds)]
        self.layers = nnx.List(part(stack, i) for stack, i in zip(stacks, places, strict=True))
        for layer in self.layers if int8 else ():
            for linear in layer.projections().values():
                linear.quantize()

    def step(
        self, tokens: jax.Array, alive: jax.Array, trunk: Trunk, rows: Rows, slots: Slots
    ) -> tuple[jax.Array, Slots]:
        """Runs one token int32 [S] of each slot; those not alive, bool [S], need not be right.

        Returns:
          Final hidden states [S, hidden], and the slots with the tokens' keys and values at column `end`.
        """
        c = self.config
        windows = [None] * c.num_hidden_layers if c.windows is None else c.windows
        x = constrain(self.embed_tokens.weight[...], "vocab", None)[tokens]
        x = constrain(x.astype(self.dtype)[:, None, None], "batch", None, None, None)
        cos, sin = rope(slots.positions[:, None, None], c.head_dim, c.rope_theta, c.rope_scaling)

        n, p = rows.v[0].shape[0], rows.v[0].shape[2]
        at = pick(slots.positions, rows.slots).reshape(n, -1)  # of the query in each cell [N, B]
        in_row = jnp.broadcast_to((jnp.arange(p) < rows.lengths[:, None])[:, None], (*at.shape, p))
        in_trunk = jnp.ones((1, tokens.size, trunk.size), bool)
        age = slots.end - jnp.arange(slots.v[0].shape[2])  # of each column, 0 for the new token
        in_slot = (age >= 0) & (age <= slots.lengths[:, None])

        new_k, new_v = [], []
        for i, layer in enumerate(self.layers):
            trunk_mask, row_mask, slot_mask = in_trunk, in_row, in_slot
            if windows[i] is not None:
                keys = jnp.arange(trunk.size + p)[None, None]
                row_mask = in_row & near(at[..., None], keys[..., trunk.size :], windows[i])[:, :, 0]
                age_in_trunk = slots.positions[:, None] - keys[0, :, : trunk.size]
                trunk_mask = (age_in_trunk < windows[i])[None]
                slot_mask = in_slot & (age < windows[i])

            def look(q, k, v, i=i, trunk_mask=trunk_mask, row_mask=row_mask, slot_mask=slot_mask):
                new_k.append(_write(slots.k[i], k[:, 0, 0, :, :, None], 3, slots.end))
                new_v.append(_write(slots.v[i], v[:, 0, 0, :, None, :], 2, slots.end))
                q = (q * jnp.asarray(c.head_dim**-0.5, q.dtype)).reshape(len(q), k.shape[3], -1, c.head_dim)
                own = _softmax_part(q, new_k[i], new_v[i], slot_mask[:, None, None])
                shared = _meet(pick(q, rows.slots), rows.k[i], rows.v[i], row_mask)
                parts = [own, [pick(x, slots.cells) for x in shared]]
                if trunk.size:
                    parts.append(_meet(q, trunk.k[i], trunk.v[i], trunk_mask))
                return _merge(parts).astype(q.dtype).reshape(len(q), 1, 1, -1), None

            x, _, _ = layer(x, alive[:, None, None], cos, sin, look)
        slots = slots._replace(
            k=tuple(new_k),
            v=tuple(new_v),
            lengths=slots.lengths + 1,
            positions=slots.positions + 1,
            end=slots.end + 1,
        )
        return self.norm(x)[:, 0, 0], slots

    head = Qwen3.head
    logits = Qwen3.logits


def stored(new: jax.Array, cache: Cache, axis: int) -> Cache:
    """Keys (tokens along axis 3) or values (axis 2) in the form in which `cache` keeps its own."""
    return quantize(new, axis=5 - axis) if isinstance(cache, Int8) else new.astype(cache.dtype)


def _write(cache: Cache, new: jax.Array, axis: int, column: jax.Array) -> Cache:
    """The cache of all slots with the keys or values of one more token at `column`."""

    def one(old, new):
        written = jax.lax.dynamic_update_slice_in_dim(old, new, column, axis)
        return constrain(written, "batch", "kv_heads", None, None)

    return jax.tree.map(one, cache, stored(new, cache, axis))


def _meet(q: jax.Array, k: Cache, v: Cache, mask: jax.Array) -> list[jax.Array]:
    """`_softmax_part` of queries [N * B, K, G, D], B for each of N prefixes, over the keys of their prefix.

    A prefix's queries meet its keys together, as [B * G] queries of one product. `mask` [N, B, P].
    """
    n = v.shape[0]
    s, heads, g, d = q.shape
    grid = q.reshape(n, -1, heads, g, d).swapaxes(1, 2).reshape(n, heads, -1, d)
    part = _softmax_part(grid, k, v, jnp.repeat(mask, g, axis=1)[:, None])
    return [x.reshape(n, heads, -1, g, x.shape[-1]).swapaxes(1, 2).reshape(s, heads, g, -1) for x in part]


def _merge(parts) -> jax.Array:
    """One softmax from those over parts of the keys, by their log-sum-exp."""
    top = functools.reduce(jnp.maximum, [part[0] for part in parts])
    scales = [jnp.exp(part[0] - top) for part in parts]
    total = sum(scale * part[1] for scale, part in zip(scales, parts, strict=True))
    return sum(scale * part[2] for scale, part in zip(scales, parts, strict=True)) / total


def _softmax_part(q, k, v, mask):
    """Maximum, sum and weighted values, float32 [A, K, Q, 1 or D], of queries over some of their keys."""
    # A scale is of a whole key or value, so it can be applied to the scores and the weights instead.
    one = jnp.ones((1, 1), jnp.float32)
    k, k_scale = k if isinstance(k, Int8) else (k, one)
    v, v_scale = v if isinstance(v, Int8) else (v, one)
    scores = jnp.einsum("akqd,akds->akqs", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * k_scale, NEVER)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    weighted = (weights * v_scale.mT).astype(q.dtype)
    values = jnp.einsum("akqs,aksd->akqd", weighted, v.astype(q.dtype), preferred_element_type=jnp.float32)
    return top, weights.sum(-1, keepdims=True), values
