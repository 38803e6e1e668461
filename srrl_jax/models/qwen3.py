"""Qwen3 in Flax NNX, over prefixes with branches.

Module and parameter names are those of `transformers`, weights keep its [out, in] layout, and the
layers are stacked on a leading axis and scanned. So a checkpoint tensor
`model.layers.3.mlp.up_proj.weight` is row 3 of the parameter `layers.mlp.up_proj.weight`, untouched.
Layers of experts have a stack of their own, `moe_layers`.
Every parameter names its logical axes where it is created (metadata `axes`); the table in
`srrl_jax.parallel` maps them to mesh axes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.kernels import gpu_prefill
from srrl_jax.kernels.attention import attend_causal, choose_kernel, within_window
from srrl_jax.kernels.packed import Pack, attend_packed
from srrl_jax.kernels.segment import Segment
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.modules import MLP, Linear, Scale, join, project
from srrl_jax.models.moe import MoE
from srrl_jax.models.rope import rope, rotate
from srrl_jax.parallel import constrain

_SAVED = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# What attention does with q [N, B, T, H, D] and k, v [N, B, T, K, D]: the caller's, who has the context.
# Returns [N, B, T, H * D], and whatever the caller keeps of the layer.
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    def __init__(self, c: Qwen3Config, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim, self.kv_heads = c.head_dim, c.num_key_value_heads
        self.q_proj = Linear(stack, (q, c.hidden_size), ("heads", "embed"), c.qkv_bias, rngs=rngs)
        self.k_proj = Linear(stack, (kv, c.hidden_size), ("kv_heads", "embed"), c.qkv_bias, rngs=rngs)
        self.v_proj = Linear(stack, (kv, c.hidden_size), ("kv_heads", "embed"), c.qkv_bias, rngs=rngs)
        self.o_proj = Linear(stack, (c.hidden_size, q), ("embed", "heads"), c.o_bias, rngs=rngs)
        self.q_norm = Scale(stack, c.head_dim, None, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = Scale(stack, c.head_dim, None, c.rms_norm_eps) if c.qk_norm else None

    def __call__(self, x, cos, sin, attend: AttendFn):
        """x [N, B, T, hidden] -> the same shape, and what `attend` keeps."""
        if self.k_proj is None:
            heads = self.grouped_heads(x)
            q = heads[..., :-2, :].reshape(*x.shape[:-1], -1, self.head_dim)
            keys_values = self._placed(heads[..., -2, :], heads[..., -1, :], cos, sin)
        else:
            q, keys_values = self._heads(self.q_proj(x)), self.keys_values(x, cos, sin)
        if self.q_norm is not None:
            q = self.q_norm(q)
        y, kept = attend(rotate(q, cos, sin), *keys_values)
        return self.o_proj(y), kept

    def join(self) -> None:
        """Makes `q_proj` compute queries, keys and values in one product; `keys_values` is then gone."""
        linears = [self.q_proj, self.k_proj, self.v_proj]
        if all(linear.adapter is None for linear in linears):
            self.q_proj = join(linears, self.kv_heads)
            self.k_proj = self.v_proj = nnx.data(None)

    def grouped_heads(self, x) -> jax.Array:
        """Neither normed nor rotated, [N, B, T, K, G + 2, D]: the G queries of a key, the key, the value."""
        parts = [linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj) if linear is not None]
        shape = (*x.shape[:-1], self.kv_heads, -1, self.head_dim)
        return jnp.concatenate([part.reshape(shape) for part in parts], axis=-2)

    def keys_values(self, x, cos, sin) -> tuple[jax.Array, jax.Array]:
        """Each [N, B, T, K, D]."""
        return self._placed(self._heads(self.k_proj(x)), self._heads(self.v_proj(x)), cos, sin)

    def _placed(self, k, v, cos, sin):
        return rotate(k if self.k_norm is None else self.k_norm(k), cos, sin), v

    def _heads(self, y):
        return y.reshape(*y.shape[:-1], -1, self.head_dim)


class Layer(nnx.Module):
    def __init__(self, c: Qwen3Config, stack: tuple[int, ...], experts: bool, *, rngs: nnx.Rngs):
        self.input_layernorm = Scale(stack, c.hidden_size, "embed", c.rms_norm_eps)
        self.self_attn = Attention(c, stack, rngs=rngs)
        self.post_attention_layernorm = Scale(stack, c.hidden_size, "embed", c.rms_norm_eps)
        if experts:
            self.mlp = MoE(c, stack, rngs=rngs)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, stack, rngs=rngs)

    def projections(self) -> dict[str, Linear]:
        """Its products with weights by name, those of experts and their router left out."""
        parts = [self.self_attn] if isinstance(self.mlp, MoE) else [self.self_attn, self.mlp]
        return {name: x for part in parts for name, x in vars(part).items() if isinstance(x, Linear)}

    def __call__(self, x, mask, cos, sin, attend: AttendFn):
        """The new x, what `attend` keeps, and the load of the experts (None in a dense layer)."""
        y, kept = self.self_attn(_gathered(self.input_layernorm(x)), cos, sin, attend)
        x, load = self.after_attention(x, y, mask)
        return x, kept, load

    def after_attention(self, x, y, mask):
        """The new x, given what attention makes of it, `y`; and the load of the experts."""
        x = x + _scattered(y)
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):  # which gathers tokens and rows at once
            y, load = self.mlp(y, mask)
        else:
            y, load = _scattered(self.mlp(_gathered(y))), None
        return x + y, load

    def keys_values(self, x, cos, sin) -> tuple[jax.Array, jax.Array]:
        """Those of its attention alone, each [N, B, T, K, D]."""
        return self.self_attn.keys_values(_gathered(self.input_layernorm(x)), cos, sin)


class Qwen3(nnx.Module):
    """The Qwen3 language model, dense or of experts (and, by config, Qwen2 and Llama).

    Args:
      config: sizes and switches.
      rngs: initial weights, normal with deviation 0.02, float32.
      dtype: of activations and matrix products; norms, softmax and log-sum-exp stay in float32.

    Attribute `attention` names the kernel: "auto", "xla", "splash" (TPU) or "cudnn" (GPU).

    >>> import jax
    >>> from srrl_jax import Qwen3, load_model
    >>> model = load_model(checkpoint)  # a directory, or a hub id such as "Qwen/Qwen3-0.6B"
    >>> logits = jax.jit(Qwen3.__call__)(model, jax.numpy.array([[5, 6, 7]]))
    >>> logits.shape == (1, 3, model.config.vocab_size)
    True
    """

    attention = "auto"

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        c = config
        self.config, self.dtype = c, jnp.dtype(dtype)
        vocab, axes = (c.vocab_size, c.hidden_size), ("vocab", "embed")
        self.embed_tokens = Linear((), vocab, axes, rngs=rngs)
        sparse = sum(c.has_experts)
        dense = c.num_hidden_layers - sparse
        self.layers = Layer(c, (dense,), experts=False, rngs=rngs) if dense else None
        self.moe_layers = Layer(c, (sparse,), experts=True, rngs=rngs) if sparse else None
        self.norm = Scale((), c.hidden_size, "embed", c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Linear((), vocab, axes, rngs=rngs)

    def __call__(self, tokens, positions=None, mask=None) -> jax.Array:
        """Logits of flat sequences.

        Args:
          tokens: int [B, T].
          positions: int [B, T]; by default counted over the true entries of `mask`.
          mask: bool [B, T], false at padding on either side; all true by default.
        Returns:
          float32 logits [B, T, V].
        """
        whole = mask is None
        mask = jnp.ones(tokens.shape, bool) if whole else mask.astype(bool)
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        x, _, _ = self.extend(tokens[:, None], positions[:, None], mask[:, None], right_padded=whole)
        return self.logits(x[:, 0])

    def extend(
        self,
        tokens,
        positions,
        mask,
        context: list[Segment] = (),
        remat: str = "none",
        right_padded: bool = True,
    ):
        """Runs tokens that continue a context: the path of training.

        Args:
          tokens: int [N, B, T], B branches of T tokens for each of N rows.
          positions: int [N, B, T], counted from the start of the row's prefix.
          mask: bool [N, B, T], false at padding. Attention within a branch is causal.
          context: what came before, each with `k`, `v` [layers, N, K, B or 1, S, D]; with `positions`
            where the config has layers of sliding attention.
          remat: what the backward pass computes again of each layer instead of keeping it: "none"; "full",
            everything; "dots", all but the products with weights.
          right_padded: all padding lies behind the tokens, as kernels want it.
        Returns:
          Final hidden states after the last norm [N, B, T, hidden]; the new tokens' keys and values,
          each [layers, N, K, B, T, D]; how the new tokens spread over the experts, the `Load` of all layers
          together, None without experts.
        Raises:
          InputError: a context without `positions` for layers of sliding attention.
        """
        c = self.config
        if c.windows is not None and any(segment.positions is None for segment in context):
            raise InputError("layer_types has sliding_attention, but a context segment has no positions")
        name = self.attention if right_padded else "xla"
        kernel = choose_kernel(name, self.dtype, c.windows is not None, tokens.shape[-1])
        own_mask = mask[:, :, None, :]
        # Kernels need no square of the length to know the order.
        if kernel == "xla" or (kernel == "cudnn" and c.windows is not None):
            steps = jnp.arange(tokens.shape[-1])
            own_mask = own_mask & (steps[:, None] >= steps[None, :])

        def attend(q, k, v, keys_values, window):
            k, v = (y.transpose(0, 3, 1, 2, 4) for y in (k, v))
            segments = [s._replace(k=k, v=v) for (k, v), s in zip(keys_values, context, strict=True)]
            allowed = own_mask
            if window is not None:
                see = partial(within_window, positions, window=window)
                segments = [s._replace(mask=s.mask & see(s.positions)) for s in segments]
                allowed = allowed & see(positions)
            return attend_causal(q, segments, Segment(k, v, allowed), kernel=kernel), (k, v)

        return self._run(tokens, positions, mask, [(s.k, s.v) for s in context], attend, remat=remat)

    def prefill(self, pack: Pack, shared: tuple = (), states: bool = False):
        """Runs packed rows, forward alone.

        Args:
          shared: keys and values of what all rows begin with, each [layers, 1, L, K, D]; or ().
          states: false where keys and values are all that is wanted: the last layer computes nothing else.
        Returns:
          Final hidden states after the last norm [G, T, hidden], or None; keys and values, each
          [layers, G, T, K, D].
        """
        c = self.config
        by_kernel = self.attention != "xla" and gpu_prefill.computes(c.head_dim, c.windows is not None)

        def attend(q, k, v, keys_values, window):
            k, v = k[:, 0], v[:, 0]
            y = attend_packed(q[:, 0], k, v, keys_values, pack, window, by_kernel)
            return y[:, None], (k, v)

        def keys_values_alone(layer: Layer, x, cos, sin):
            # Of what a condition gives back, a GPU's compiler would else gather all rows.
            return tuple(
                constrain(y[:, 0], "batch", None, "kv_heads", None) for y in layer.keys_values(x, cos, sin)
            )

        tokens, positions = pack.tokens[:, None], pack.positions[:, None]
        at_last = None if states else keys_values_alone
        x, kv, _ = self._run(tokens, positions, positions >= 0, shared, attend, at_last)
        return x[:, 0] if states else None, kv

    def _run(
        self, tokens, positions, mask, context, attend, at_last=None, remat: str = "none"
    ) -> tuple[Any, Any, Any]:
        """All layers.

        Args:
          context: a tree of arrays [layers, ...], of which `attend` gets those of its layer.
          attend: attention, with the context and the window of the layer.
          at_last: all that is wanted of the last layer; there are no hidden states then.
        """
        c = self.config
        # Whole rows for the lookup: XLA would else replicate its result, [N, B, T, hidden].
        x = constrain(self.embed_tokens.weight[...], "vocab", None)[tokens].astype(self.dtype)
        x = _scattered(x)
        cos, sin = rope(positions, c.head_dim, c.rope_theta, c.rope_scaling)

        def run(x, layers: Layer, of_kind: slice, of_all: slice):
            """Scans a run of layers of one kind, given which of its stack and which of all they are."""
            graphdef, stacked = nnx.split(layers)

            def body(x, layer_inputs):
                weights, of_layer, window, is_last = layer_inputs
                layer = nnx.merge(graphdef, weights)

                def whole(x):
                    x, kv, load = layer(
                        x, mask, cos, sin, partial(attend, keys_values=of_layer, window=window)
                    )
                    return constrain(x, *_CUT), kv, load

                def in_part(x):
                    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(whole, x)[2])
                    return x, at_last(layer, x, cos, sin), nothing

                x, *new = whole(x) if at_last is None else jax.lax.cond(is_last, in_part, whole, x)
                return x, new

            if remat != "none":
                body = jax.checkpoint(body, policy=_SAVED[remat])
            is_last = None if at_last is None else jnp.arange(c.num_hidden_layers) == c.num_hidden_layers - 1
            of_each = take_layers((context, c.windows, is_last), of_all)
            return jax.lax.scan(body, x, (take_layers(stacked, of_kind), *of_each))

        keys_values, loads = [], []
        for experts, of_kind, of_all in layer_runs(c.has_experts):
            x, (kv, load) = run(x, self.moe_layers if experts else self.layers, of_kind, of_all)
            keys_values.append(kv)
            loads += [load] if experts else []
        kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), *keys_values)
        load = jax.tree.map(lambda *parts: jnp.concatenate(parts).sum(0), *loads) if loads else None
        return _gathered(self.norm(x)) if at_last is None else None, kv, load

    @property
    def head(self) -> jax.Array:
        """The unembedding [V, hidden]."""
        return (self.lm_head or self.embed_tokens).weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., hidden] -> float32 logits [..., V]; for few positions (see `head.py`)."""
        return project(hidden, self.head, jnp.float32)


# Activations [N, B, T, hidden] between layers, of which each device of the mesh axis `tensor` has some
# tokens, and within attention and MLPs, whose weights it cuts: sequence parallelism (Korthikanti et al.,
# arXiv 2205.05198). A sum over `tensor` costs the same in these two halves, and what the backward pass
# keeps of a layer, and all that norms compute, is divided by `tensor`.
_CUT = ("batch", None, "tokens", None)
_WHOLE = ("batch", None, None, None)


def _gathered(x: jax.Array) -> jax.Array:
    """From between layers to within. Both pins, so that the gradient's way back is `_scattered`."""
    return constrain(constrain(x, *_CUT), *_WHOLE)


def _scattered(x: jax.Array) -> jax.Array:
    """From within a layer, where `x` may be a sum over `tensor`, to between layers."""
    return constrain(constrain(x, *_WHOLE), *_CUT)


def layer_runs(has_experts: Sequence[bool]) -> Iterator[tuple[bool, slice, slice]]:
    """Runs of equal layers, in order: whether of experts; which of their kind, and of all, they are."""
    seen = {False: 0, True: 0}
    for experts, layers in itertools.groupby(has_experts):
        size, start = len(list(layers)), sum(seen.values())
        yield experts, slice(seen[experts], seen[experts] + size), slice(start, start + size)
        seen[experts] += size


def take_layers(stacks: Any, rows: slice) -> Any:
    """The given rows of all arrays of a tree; a stack that is wanted whole is not copied."""
    return jax.tree.map(lambda x: x if rows == slice(0, len(x)) else x[rows], stacks)
