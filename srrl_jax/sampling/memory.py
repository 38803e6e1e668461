"""How many rows may run at one time: a formula of what they take, against a budget."""

import os

import jax
import jax.numpy as jnp

from srrl_jax.errors import InputError
from srrl_jax.models.attention import BLOCK
from srrl_jax.models.config import Qwen3Config
from srrl_jax.sampling.buckets import Buckets, Lengths, sort_rows
from srrl_jax.sampling.schedule import CHUNK


def default_budget(limit: int | None = None) -> int:
    """Half of a device's memory (of `limit` bytes, if that is known); where it does not tell, half of the
    machine's, shared by its devices."""
    limit = limit or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return limit // 2


def needed(
    c: Qwen3Config,
    dtype,
    tensor: int,
    prefix: int,
    fan_out: int,
    branch: int,
    new_tokens: int,
    has_scores: bool = True,
) -> int:
    """Bytes of a device, besides the weights, that each row of these sizes takes as it enters and decodes.

    Twice as many prefixes may stay (see `Buckets.rows`). Keys and values of what enters exist twice, as
    computed and as placed, those that stay twice while caches grow; scores exist for `BLOCK` queries of a
    branch, and once more as weights.

    Args:
      tensor: size of the mesh axis; heads and vocabulary that it does not divide are whole everywhere.
      has_scores: false with an attention kernel that never writes them down.
    """
    kv, heads, vocab = (
        n if n % tensor else n // tensor for n in (c.num_key_value_heads, c.num_attention_heads, c.vocab_size)
    )
    size = jnp.dtype(dtype).itemsize
    inner = c.intermediate_size
    if c.moe is not None:
        inner = max(inner, c.moe.num_experts_per_tok * c.moe.moe_intermediate_size)
    key_values = 2 * c.num_hidden_layers * kv * c.head_dim * size  # of a token
    layer = size * (4 * c.hidden_size + 2 * inner + (heads + 2 * kv) * c.head_dim)  # its intermediate results
    scores = max(min(prefix, BLOCK) * prefix, fan_out * min(branch, BLOCK) * (prefix + branch))
    scores = scores if has_scores else 0

    stay = key_values * (2 * prefix + fan_out * (branch + new_tokens + CHUNK))
    enter = (2 * key_values + layer) * (prefix + fan_out * branch) + 2 * 4 * heads * scores
    logits = 4 * 4 * fan_out * vocab
    return max(2 * stay, stay + enter) + logits


def rows_within(
    budget: int,
    c: Qwen3Config,
    dtype,
    mesh_sizes: tuple[int, int],
    buckets: Buckets,
    lengths: Lengths,
    new_tokens: int,
    has_scores: bool = True,
) -> tuple[int, ...]:
    """Those sizes of `buckets.rows` with which these rows fit; if none, the largest below them that does.

    Args:
      budget: bytes of a device, besides the weights.
      mesh_sizes: pieces that rows are cut into, and the size of the axis `tensor`.
      has_scores: as in `needed`.
    Raises:
      InputError: what `sort_rows` refuses, or not even a row in each piece fits.
    """
    shards, tensor = mesh_sizes
    sizes = [entry[1] for entry in sort_rows(lengths, buckets)]
    largest = tuple(max(column) for column in zip(*sizes, strict=True))
    if not largest:
        return buckets.rows
    row = needed(c, dtype, tensor, *largest, new_tokens, has_scores)
    most = budget // row * shards
    if most == 0:
        prefix, fan_out, branch = largest
        raise InputError(
            f"memory_gb: one row of {prefix} prefix tokens and {fan_out} branches of {branch} given and "
            f"{new_tokens} new tokens takes {row / 1e9:.2g} GB of a device beside the weights, over the "
            f"budget of {budget / 1e9:.2g} GB; raise memory_gb, or use smaller buckets or fewer new tokens"
        )
    return tuple(rows for rows in buckets.rows if rows <= most) or (most,)
