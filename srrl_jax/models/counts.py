"""FLOPs and bytes of the phases of training by formula, from the sizes of the network and of its batch.

The compiler's own count takes a scan's body once, so it says nothing of a whole program.
"""

import dataclasses
from typing import NamedTuple

from srrl_jax.models.config import Qwen3Config


class Work(NamedTuple):
    """Of all devices together: FLOPs; bytes between memory and cores, weights apart.

    `weights` are the bytes of weights (in the compute type) that pass once, to be divided by the devices
    that share them.
    """

    flops: float
    traffic: float
    weights: float

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "Work":
        return Work(*(count * x for x in self))


@dataclasses.dataclass(frozen=True)
class Tree:
    """Sizes of a tree batch: N prefixes of P tokens, B branches each of L."""

    n: int
    p: int
    b: int
    l: int  # noqa: E741

    @property
    def tokens(self) -> int:
        return self.n * (self.p + self.b * self.l)


def layer_weights(c: Qwen3Config) -> int:
    """Numbers in the matrices of all layers that one token meets."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * q + 2 * kv)
    return sum(attention + 3 * c.hidden_size * width for width in _widths(c)) + _routers(c)


def stored_weights(c: Qwen3Config) -> int:
    """Numbers in the matrices of all layers, all experts counted."""
    if c.moe is None:
        return layer_weights(c)
    unused = c.moe.num_experts - c.moe.num_experts_per_tok
    return layer_weights(c) + sum(c.has_experts) * 3 * c.hidden_size * c.moe.moe_intermediate_size * unused


def parameters(c: Qwen3Config) -> int:
    """Numbers in all matrices."""
    return stored_weights(c) + c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)


def cache_bytes(c: Qwen3Config, width: int) -> int:
    """Of keys and values of one token, in numbers of `width` bytes."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width


def forward(c: Qwen3Config, tree: Tree, width: int, causal: bool) -> Work:
    """All layers over a tree batch; `causal`: blocks above the diagonal are skipped (fused attention)."""
    half = 2 if causal else 1
    pairs = tree.n * (tree.p**2 / half + tree.b * (tree.l * tree.p + tree.l**2 / half))
    flops = 2 * layer_weights(c) * tree.tokens + _attention(c, pairs)
    # Each product reads its input and writes its output, in the compute type.
    return Work(flops, tree.tokens * _activations(c) * width, stored_weights(c) * width)


def head(c: Qwen3Config, positions: float, width: int) -> Work:
    """Logits of `positions` tokens; float32, written and read once."""
    size = c.vocab_size * c.hidden_size
    return Work(2 * size * positions, positions * c.vocab_size * 8, size * width)


def decode_step(c: Qwen3Config, tree: Tree, width: int) -> Work:
    """One token for each branch: weights, and the whole cache of `tree.l` own tokens, are read once."""
    slots = tree.n * tree.b
    layers = Work(
        2 * layer_weights(c) * slots + _attention(c, slots * (tree.p + tree.l)),
        tree.tokens * cache_bytes(c, width) + slots * _activations(c) * width,
        _met_weights(c, slots) * width,
    )
    return layers + head(c, slots, width)


def update(c: Qwen3Config, tree: Tree, width: int, causal: bool, remat: str, frozen: bool = False) -> Work:
    """Value and gradient over a microbatch, whose layers and head the backward pass computes again.

    `frozen`: without gradients of the matrices (LoRA, whose own products are left out).
    """
    once = forward(c, tree, width, causal)
    products = 2 * layer_weights(c) * tree.tokens
    attention = once.flops - products
    again = {"none": 0, "full": once.flops, "dots": attention}[remat]
    passes = 3 * once.flops - (products if frozen else 0)
    layers = Work(passes + again, 4 * once.traffic, 3 * once.weights)
    logits = head(c, tree.n * tree.b * tree.l, width)
    return layers + logits._replace(traffic=0).times(3 if frozen else 4)


def adamw(parameters: int) -> Work:
    """Float32 weights, both moments and the gradient: read, and all but the gradient written."""
    return Work(12 * parameters, 4 * 7 * parameters, 0)


def widest_mlp(c: Qwen3Config) -> int:
    """Numbers between the products of a layer's MLP, for a token, in the layer that has most."""
    sparse = c.moe.num_experts_per_tok * c.moe.moe_intermediate_size if c.moe else 0
    return max(c.intermediate_size, sparse)


def _widths(c: Qwen3Config) -> list[int]:
    """Of each layer's MLP, as one token meets it."""
    sparse = c.moe and c.moe.num_experts_per_tok * c.moe.moe_intermediate_size
    return [sparse if experts else c.intermediate_size for experts in c.has_experts]


def _routers(c: Qwen3Config) -> int:
    return sum(c.has_experts) * c.hidden_size * c.moe.num_experts if c.moe else 0


def _met_weights(c: Qwen3Config, tokens: int) -> float:
    """Numbers in the layers' matrices that any of a few tokens meets, when experts are chosen evenly."""
    if c.moe is None:
        return layer_weights(c)
    m = c.moe
    met = m.num_experts * (1 - (1 - m.num_experts_per_tok / m.num_experts) ** tokens)
    expert = 3 * c.hidden_size * m.moe_intermediate_size
    return layer_weights(c) + sum(c.has_experts) * expert * (met - m.num_experts_per_tok)


def _attention(c: Qwen3Config, pairs: float) -> float:
    """FLOPs of both products, over pairs of a query and a key."""
    return 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs


def _activations(c: Qwen3Config) -> int:
    """Numbers that the products of all layers read and write for one token."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size + 2 * (q + 2 * kv) + q + c.hidden_size
    return sum(attention + 2 * c.hidden_size + 5 * width for width in _widths(c))
