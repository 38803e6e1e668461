"""The network as it decodes: one token for each running branch, on caches that are written in place."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.kernels import gpu_decode
from srrl_jax.kernels.attention import NEVER, attend_part, merge_parts
from srrl_jax.kernels.int8 import Int8, quantize
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.modules import MLP
from srrl_jax.models.qwen3 import Qwen3, layer_runs, take_layers
from srrl_jax.models.rope import rope
from srrl_jax.parallel import constrain, platform

KEY_BLOCK = 512  # tokens of a cache that are met at a time where that saves reading the rest

Cache = jax.Array | Int8  # of shape [...] or, in 8 bits, with a scale for each token and head


class KeysValues(NamedTuple):
    """Of A sequences of T tokens: for each stack of n layers of a `Decoder`, `k` [n, A, K, D, T] and `v`
    [n, A, K, T, D], without the first axis where the layers lie apart."""

    k: tuple[Cache, ...] = ()
    v: tuple[Cache, ...] = ()


class PrefixCache(NamedTuple):
    """Caches of N rows, over R shards of the mesh: each holds a prefix and then what its branches are given.

    Each row has B cells; a cell is a (row, branch) pair.

    Shapes: `kv` of N sequences; `lengths` int32 [N], of the prefixes; `first`, `ends` int32 [N, B], from
    where to before where a row holds what the branch of a cell is given; `slots` int32 [R, N / R * B], which
    slot of its shard holds the branch of a cell, -1 where none does.
    """

    kv: KeysValues
    lengths: jax.Array
    first: jax.Array
    ends: jax.Array
    slots: jax.Array


class BranchCache(NamedTuple):
    """What S running branches have drawn, after the last token given to them, in a ring.

    All have their next token in column `end` modulo T.

    Shapes: `kv` of S sequences; `lengths` int32 [S], tokens in the columns before `end`; `positions` int32
    [S], of the next token; `cells` int32 [R, S / R], the branch's cell among those of its shard; `end` int32.
    """

    kv: KeysValues
    lengths: jax.Array
    positions: jax.Array
    cells: jax.Array
    end: jax.Array


def gather_per_shard(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers rows of `x` [A, ...] within each of R mesh shards by `index` int32 [R, C] -> [R * C, ...].

    No data crosses devices.
    """
    shards, count = index.shape
    parts = x.reshape(shards, -1, *x.shape[1:])
    return jax.vmap(lambda part, i: part[i])(parts, index).reshape(shards * count, *x.shape[1:])


def layers_are_unstacked() -> bool:
    """Whether each layer has arrays of its own, as on CPUs and GPUs.

    There a `lax.scan` over stacked layers would copy each layer's weights and cache at each token.
    """
    return platform() != "tpu"


def stacks_of(has_experts: Sequence[bool]) -> list[tuple[bool, slice, slice]]:
    """How layers are stacked to decode: whether of experts; which of their kind, and of all, they are.

    Where layers lie apart each is compiled for itself; elsewhere equal layers in a row are scanned over.
    """
    runs = list(layer_runs(has_experts))
    if not layers_are_unstacked():
        return runs
    return [
        (experts, slice(i, i + 1), slice(j, j + 1))
        for experts, of_kind, of_all in runs
        for i, j in zip(range(of_kind.start, of_kind.stop), range(of_all.start, of_all.stop), strict=True)
    ]


def _by_kernels(c: Qwen3Config) -> bool:
    """Whether attention is computed by the kernels of `gpu_decode`, unless caches are of 8 bits."""
    group = c.num_attention_heads // c.num_key_value_heads
    return gpu_decode.computes(c.head_dim, c.windows is not None, group)


class Decoder(nnx.Module):
    """A Qwen3 in its compute type, with its layers as they are decoded: `nnx.state(Decoder(model))` is what
    decoding takes in place of `nnx.state(model)`.

    Args:
      int8: keep the weights of attention and dense MLPs in 8 bits, with a scale for each output; the
        embedding, the head, norms, routers and experts are as they are without.

    Where the kernels of `gpu_decode` compute, products of the same input are joined.
    """

    def __init__(self, model: Qwen3, int8: bool = False):
        def cast(x):
            return x.astype(model.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        def part(module, layers: slice | None = None):
            def take(variable):
                value = cast(variable[...])
                if layers is not None:
                    value = value[layers.start] if self.unstacked else take_layers(value, layers)
                taken = variable.replace(value)
                taken.set_metadata(axes=variable.get_metadata()["axes"][-value.ndim :])
                return taken

            graphdef, state = nnx.split(module)
            is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
            return nnx.merge(graphdef, jax.tree.map(take, state, is_leaf=is_leaf))

        self.config, self.dtype, self.unstacked = model.config, model.dtype, layers_are_unstacked()
        self.embed_tokens, self.norm = part(model.embed_tokens), part(model.norm)
        self.lm_head = None if model.lm_head is None else part(model.lm_head)
        self.stacks = nnx.List(
            part(model.moe_layers if experts else model.layers, of_kind)
            for experts, of_kind, _ in stacks_of(model.config.has_experts)
        )
        for layer in self.stacks if _by_kernels(self.config) else ():
            layer.self_attn.join()
            if isinstance(layer.mlp, MLP):
                layer.mlp.join()
        for stack in self.stacks if int8 else ():
            for linear in stack.projections().values():
                linear.quantize()

    def step(
        self,
        tokens: jax.Array,
        alive: jax.Array,
        shared: KeysValues,
        prefixes: PrefixCache,
        branches: BranchCache,
    ) -> tuple[jax.Array, BranchCache]:
        """Runs one token int32 [S] of each slot; those not alive, bool [S], need not be right.

        Args:
          shared: of one sequence, the tokens that all prefixes begin with; none without.
        Returns:
          Final hidden states [S, hidden], and the cache with the tokens' keys and values at `end`.
        """
        c = self.config
        x = constrain(self.embed_tokens.weight[...], "vocab", None)[tokens]
        x = constrain(x.astype(self.dtype)[:, None, None], "batch", None, None, None)
        cos, sin = rope(branches.positions[:, None, None], c.head_dim, c.rope_theta, c.rope_scaling)
        start = shared.v[0].shape[-2] if shared.v else 0
        by_kernel = not isinstance(branches.kv.k[0], Int8) and _by_kernels(c)
        places = gpu_decode.SlotTable(
            cos[:, 0, 0],
            sin[:, 0, 0],
            prefixes.lengths,
            prefixes.first,
            prefixes.ends,
            prefixes.slots,
            branches.cells,
            jnp.where(alive, branches.lengths, 0),
            branches.end[None] % branches.kv.v[0].shape[-2],
        )

        n, p = prefixes.lengths.size, prefixes.kv.v[0].shape[-2]
        # Positions of the query in each cell [N, B].
        at = gather_per_shard(branches.positions, prefixes.slots).reshape(n, -1)
        place, lengths, first = jnp.arange(p), prefixes.lengths[:, None, None], prefixes.first[..., None]
        in_row = (place < lengths) | ((first <= place) & (place < prefixes.ends[..., None]))  # [N, B, P]
        width = branches.kv.v[0].shape[-2]
        column = branches.end % width
        age = (branches.end - jnp.arange(width)) % width  # of each column, 0 for the new token
        in_branch = age <= branches.lengths[:, None]
        # Blocks of keys that hold something: from the first on, so many.
        row_blocks = 0, -(-jnp.maximum(prefixes.lengths.max(), prefixes.ends.max()) // KEY_BLOCK)
        oldest = branches.end - jnp.where(alive, branches.lengths, 0).max()
        begin = oldest // KEY_BLOCK
        own_blocks = begin, jnp.minimum(branches.end // KEY_BLOCK - begin + 1, width // KEY_BLOCK)

        def run(layer, x, own: KeysValues, prefix: tuple, shared_kv: tuple, window, index=()):
            """One layer; `own` of its whole stack, at `index` (of its own, without)."""
            shared_mask, row_mask, own_mask = jnp.ones((1, tokens.size, start), bool), in_row, in_branch
            if window is not None:
                keys = start + jnp.where(place < lengths, place, lengths + place - first)
                row_mask = in_row & (at[..., None] - keys < window)
                shared_mask = (branches.positions[:, None] - jnp.arange(start) < window)[None]
                own_mask = in_branch & (age < window)
            written = []

            def attend(q, k, v):
                new_k = _write(own.k, k[:, 0, 0, :, :, None], (*index, 0, 0, 0, column))
                new_v = _write(own.v, v[:, 0, 0, :, None, :], (*index, 0, 0, column, 0))
                written.append(KeysValues(new_k, new_v))
                here = jax.tree.map(lambda x: x[index] if index else x, written[0])
                q = (q * jnp.asarray(c.head_dim**-0.5, q.dtype)).reshape(len(q), k.shape[3], -1, c.head_dim)
                parts = [_attend_blocks(q, *here, own_mask[:, None, None], own_blocks)]
                met = _attend_prefixes(gather_per_shard(q, prefixes.slots), *prefix, row_mask, row_blocks)
                parts.append([gather_per_shard(x, branches.cells) for x in met])
                if start:
                    parts.append(_attend_prefixes(q, *shared_kv, shared_mask, (0, -(-start // KEY_BLOCK))))
                _, total, values = merge_parts(parts)
                return (values / total).astype(q.dtype).reshape(len(q), 1, 1, -1), None

            x, _, _ = layer(x, alive[:, None, None], cos, sin, attend)
            return x, written[0]

        @jax.jit  # so that equal layers are lowered once
        def run_on_gpu(layer, x, own: KeysValues, prefix: tuple, shared_kv: tuple):
            layer = nnx.merge(*layer)
            attention = layer.self_attn
            heads = attention.grouped_heads(layer.input_layernorm(x))[:, 0, 0]
            norms = (norm and norm.weight[...] for norm in (attention.q_norm, attention.k_norm))
            new = gpu_decode.NewToken(heads, *norms)
            y, own = gpu_decode.attend(new, tuple(own), prefix, shared_kv, places, eps=c.rms_norm_eps)
            y = attention.o_proj(y.reshape(*x.shape[:3], -1))
            return layer.after_attention(x, y, alive[:, None, None])[0], KeysValues(*own)

        windows, caches = None if c.windows is None else np.asarray(c.windows), []
        for i, (_, _, of_all) in enumerate(stacks_of(c.has_experts)):
            own, prefix = (KeysValues(kv.k[i], kv.v[i]) for kv in (branches.kv, prefixes.kv))
            shared_kv = (shared.k[i], shared.v[i]) if start else ()
            window = None if windows is None else windows[of_all]
            if by_kernel:
                x, own = run_on_gpu(nnx.split(self.stacks[i]), x, own, tuple(prefix), shared_kv)
            elif self.unstacked:
                x, own = run(self.stacks[i], x, own, prefix, shared_kv, None if window is None else window[0])
            else:
                graphdef, weights = nnx.split(self.stacks[i])

                def body(carry, inputs, graphdef=graphdef):
                    weights, *others, index = inputs
                    x, own = carry
                    return run(nnx.merge(graphdef, weights), x, own, *others, (index,)), None

                indices = jnp.arange(of_all.stop - of_all.start)
                (x, own), _ = jax.lax.scan(body, (x, own), (weights, prefix, shared_kv, window, indices))
            caches.append(own)
        branches = branches._replace(
            kv=KeysValues(*map(tuple, zip(*caches, strict=True))),
            lengths=branches.lengths + 1,
            positions=branches.positions + 1,
            end=branches.end + 1,
        )
        return self.norm(x)[:, 0, 0], branches

    head = Qwen3.head
    logits = Qwen3.logits


def to_cache_format(new: jax.Array, cache: Cache, axis: int) -> Cache:
    """New keys [..., D, T] or values [..., T, D] in the dtype of `cache`, quantized over `axis`: D's."""
    return quantize(new, axis=axis) if isinstance(cache, Int8) else new.astype(cache.dtype)


def _write(cache: Cache, new: jax.Array, at: tuple) -> Cache:
    """The cache with the keys or values of one more token of all slots."""

    def one(old, new):
        new = new.reshape(*[1] * (old.ndim - new.ndim), *new.shape)
        written = jax.lax.dynamic_update_slice(old, new, at)
        return constrain(written, *[None] * (old.ndim - 4), "batch", "kv_heads", None, None)

    axis = -2 if new.shape[-1] == 1 else -1
    return jax.tree.map(one, cache, to_cache_format(new, cache, axis))


def _attend_prefixes(q: jax.Array, k: Cache, v: Cache, mask: jax.Array, blocks) -> list[jax.Array]:
    """`_attend_blocks` of queries [N * B, K, G, D], B for each of N prefixes, over the keys of their prefix.

    A prefix's queries meet its keys together, as [B * G] queries of one product. `mask` [N, B, P].
    """
    n = v.shape[0]
    s, heads, g, d = q.shape
    grid = q.reshape(n, -1, heads, g, d).swapaxes(1, 2).reshape(n, heads, -1, d)
    part = _attend_blocks(grid, k, v, jnp.repeat(mask, g, axis=1)[:, None], blocks)
    return [x.reshape(n, heads, -1, g, x.shape[-1]).swapaxes(1, 2).reshape(s, heads, g, -1) for x in part]


def _attend_blocks(q, k: Cache, v: Cache, mask, blocks) -> list[jax.Array]:
    """`attend_part`, a block of `KEY_BLOCK` keys after the other, over `blocks`: from the first on (counted
    modulo the cache's), how many. The rest of the cache is not read.

    A GPU reads all at once: its host would have to start each round of a loop.
    """
    size = v.shape[-2]
    if size <= KEY_BLOCK or size % KEY_BLOCK or platform() == "gpu":
        return attend_part(q, k, v, mask)
    first, count = blocks

    def block(x, i, axis):
        start = (first + i) % (size // KEY_BLOCK) * KEY_BLOCK
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, KEY_BLOCK, axis), x)

    def attend_block(i, done):
        return merge_parts([done, attend_part(q, block(k, i, -1), block(v, i, -2), block(mask, i, -1))])

    nothing = (jnp.full((*q.shape[:3], 1), NEVER), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q.shape))
    return jax.lax.fori_loop(0, count, attend_block, [x.astype(jnp.float32) for x in nothing])
