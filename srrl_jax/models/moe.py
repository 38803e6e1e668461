"""Mixture of experts: a router sends each token to a few of many MLPs, and adds up what they say.

No token is ever dropped, whatever the load. Source: `Qwen3MoeSparseMoeBlock` of transformers 5.23.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srrl_jax.kernels.ragged import ragged_product
from srrl_jax.models.config import Qwen3Config
from srrl_jax.models.modules import MLP, Linear
from srrl_jax.parallel import mesh_axes


class Load(NamedTuple):
    """How tokens spread over experts, summed over tokens (and layers); padding does not count.

    Shapes, all float32: `chosen` [experts], tokens sent to each expert; `probability` [experts], sums of
    the router's probabilities; `tokens` [], how many were routed.
    """

    chosen: jax.Array
    probability: jax.Array
    tokens: jax.Array

    def imbalance(self) -> jax.Array:
        """The load-balancing loss: float32 scalar, experts per token when even, more when uneven.

        Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6, over all layers together, as
        `load_balancing_loss_func` of transformers 5.23 has it.
        """
        experts = self.chosen.shape[-1]
        return experts * (self.chosen * self.probability).sum(-1) / self.tokens**2


class MoE(nnx.Module):
    def __init__(self, c: Qwen3Config, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        m = c.moe
        self.experts_per_token, self.normalize = m.num_experts_per_tok, m.norm_topk_prob
        self.gate = Linear(stack, (m.num_experts, c.hidden_size), (None, "embed"), rngs=rngs)
        self.experts = MLP(c.hidden_size, m.moe_intermediate_size, (*stack, m.num_experts), rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Load]:
        """x [N, B, T, hidden], mask bool [N, B, T] -> the same shape as x, zero at padding; and the load."""
        probability = jax.nn.softmax(self.gate(x).astype(jnp.float32))
        weights, chosen = jax.lax.top_k(probability, self.experts_per_token)  # [N, B, T, experts of a token]
        if self.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        experts = probability.shape[-1]
        chosen = jnp.where(mask[..., None], chosen, experts)  # padding goes to no expert
        e = self.experts
        matrices = [p.weight[...].astype(x.dtype) for p in (e.gate_proj, e.up_proj, e.down_proj)]
        y = _on_the_mesh(x, weights.astype(x.dtype), chosen, *matrices)
        load = Load(
            jax.nn.one_hot(chosen, experts).sum((0, 1, 2, 3)),
            jnp.where(mask[..., None], probability, 0.0).sum((0, 1, 2)),
            mask.sum().astype(jnp.float32),
        )
        return y, load


def mix_experts(x, weights, chosen, gate, up, down) -> jax.Array:
    """The weighted sum of the MLPs that each token has chosen.

    Args:
      x: [tokens, hidden].
      weights: [tokens, K], of the token's experts.
      chosen: int [tokens, K], numbers of the token's experts; those out of range add nothing.
      gate, up: [experts, intermediate, hidden].
      down: [experts, hidden, intermediate].
    Returns:
      [tokens, hidden].
    """
    (tokens, k), experts = chosen.shape, gate.shape[0]
    chosen = chosen.reshape(-1)
    chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=experts + 1)[:experts]
    # Not every backend says what a ragged product holds beyond its last group: keep it out, both ways.
    live = (jnp.arange(tokens * k) < sizes.sum())[:, None]
    product = partial(ragged_product, sizes=sizes)
    rows = jnp.where(live, x[order // k], 0)
    rows = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    rows = jnp.where(live, rows, 0) * weights.reshape(-1)[order][:, None]
    return rows[jnp.argsort(order)].reshape(tokens, k, -1).sum(1)


def _on_the_mesh(x, weights, chosen, gate, up, down) -> jax.Array:
    """`mix_experts` of x [N, B, T, hidden], each device with its own experts under the current mesh.

    The rows that an `expert` group of devices holds are gathered there, and the tokens that `tensor` cuts;
    each device computes what its experts (under `tensor` its part of them) add to all of these, and gets
    the sum of its own.
    """
    experts, inner = mesh_axes("experts", gate.shape[0]), mesh_axes("mlp", gate.shape[1])
    rows, tokens = mesh_axes("batch", x.shape[0]), mesh_axes("tokens", x.shape[2])
    # Of the axes that cut the weights: those whose devices have other tokens, and the same ones.
    cut = (experts if rows else ()) + (inner if tokens else ())
    whole = tuple(axis for axis in experts + inner if axis not in cut)
    rows = rows or mesh_axes("expert_rows", x.shape[0])
    apart = tuple(axis for axis in rows + tokens if axis not in experts + inner)  # of the other axes

    def local(x, weights, chosen, gate, up, down):
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen)]
        if cut:
            flat = [jax.lax.all_gather(a, cut, tiled=True) for a in flat]
        *given, chosen = flat
        # JAX 0.10 does not by itself sum the gradient of a gather whose indices alone differ by device.
        given = [jax.lax.pcast(a, whole, to="varying") for a in given]
        matrices = [jax.lax.pcast(a, apart, to="varying") for a in (gate, up, down)]
        if experts:
            chosen = chosen - jax.lax.axis_index(experts) * gate.shape[0]
        y = jax.lax.psum(mix_experts(*given, chosen, *matrices), whole)
        if cut:
            y = jax.lax.psum_scatter(y, cut, tiled=True)
        return y.reshape(x.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, weights, chosen, gate, up, down)
    place = P(rows, None, tokens)
    return jax.shard_map(
        local,
        in_specs=(place, place, place, P(experts, inner), P(experts, inner), P(experts, None, inner)),
        out_specs=place,
    )(x, weights, chosen, gate, up, down)
