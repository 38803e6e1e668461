"""The shapes that a sampler is compiled for, planned from the lengths of the rows that it serves."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from srrl_jax.errors import InputError
from srrl_jax.kernels.packed import block_size
from srrl_jax.models import counts
from srrl_jax.models.config import Qwen3Config
from srrl_jax.parallel import platform
from srrl_jax.sampling.decoder import KEY_BLOCK

# Every call of a program reads all weights, whatever its size. On common chips that takes as long as
# computing about this many tokens.
CALL_OVERHEAD_TOKENS = 256
MOST_STEPS = 32  # decode steps of a call, after which the host sees the result; more spread its cost further
# Most tokens of a prefill with more than one row for each device; a GPU copies all weights for each.
_PREFILL_TOKENS = {"gpu": 16384}
_FEWER_PREFILL_TOKENS = 8192
_SLOTS = {"cpu": 512}  # most branches at a time for each piece of a batch
_MORE_SLOTS = 1024  # elsewhere
_RESIDENT = 1.5  # prefixes in the cache for each that runs whole: some have a last branch that runs on


class RowLengths(NamedTuple):
    """Tokens of a row's prefix, and of what each of its branches is given."""

    prefix: int
    branches: Sequence[int]

    @property
    def tokens(self) -> int:
        """All that is prefilled of the row, at most."""
        return self.prefix + sum(self.branches)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All sizes of a sampler's programs.

    Attributes:
      pack: tokens of rows that are prefilled together, on each piece of the mesh.
      packed: most rows of a pack.
      rows: rows in the cache, each up to `row` tokens: a prefix and what its branches are given.
      running: rows that run at a time.
      slots: branches that run at a time.
      fan_out: most branches of a row.
      widths: sizes that the cache of branches grows to, the last for the last token that a branch is given
        and all that are drawn but the last. One but on a CPU, which is slow to read what is not there yet.
      given: most tokens of a prefix with one branch, which the model's positions bound.
    """

    pack: int
    packed: int
    rows: int
    row: int
    running: int
    slots: int
    fan_out: int
    widths: tuple[int, ...]
    given: int

    @property
    def own(self) -> int:
        """Tokens of a branch in the cache."""
        return self.widths[-1]

    def hold(self, row: RowLengths) -> bool:
        """Whether a row fits."""
        fits = row.tokens <= min(self.row, self.pack) and row.prefix + max(row.branches) <= self.given
        return fits and len(row.branches) <= self.fan_out


@dataclasses.dataclass(frozen=True)
class Memory:
    """What sampling takes of a device beside the weights, by a formula.

    Attributes:
      budget: bytes that it may take; by default half of the device's memory, of the machine's on a CPU.
      tensor: size of the mesh axis; heads and vocabulary that it does not divide are whole everywhere.
      shards: pieces that rows are cut into.
    """

    config: Qwen3Config
    dtype: jnp.dtype
    budget: int
    tensor: int = 1
    shards: int = 1

    def needed(self, shapes: Shapes) -> int:
        """Bytes of the caches, and of the largest prefill or of a step of decoding."""
        c = self.config
        kv, heads, vocab = (
            n if n % self.tensor else n // self.tensor
            for n in (c.num_key_value_heads, c.num_attention_heads, c.vocab_size)
        )
        size = jnp.dtype(self.dtype).itemsize
        key_values = 2 * c.num_hidden_layers * kv * c.head_dim * size  # of a token
        inner = counts.widest_mlp(c)
        layer = size * (4 * c.hidden_size + 2 * inner + (heads + 2 * kv) * c.head_dim)  # results within it
        cached = key_values * (shapes.rows * shapes.row + shapes.slots * shapes.own)
        scores = 4 * 4 * heads * min(shapes.pack, block_size()) ** 2
        enter = self.shards * (shapes.pack * (2 * key_values + layer) + scores)  # new ones, and as cached
        decode = 4 * 4 * shapes.slots * vocab  # logits
        if platform() == "tpu":  # whose compiler may lay out the branches' cache anew for the loop
            decode += key_values * shapes.slots * shapes.own
        return (cached + max(enter, decode)) // self.shards


def default_budget(limit: int | None = None) -> int:
    """Half of a device's memory (of `limit` bytes, if that is known); where it does not tell, half of the
    machine's, shared by its devices."""
    limit = limit or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return limit // 2


def plan_shapes(
    rows: Iterable[RowLengths],
    new_tokens: int,
    memory: Memory,
    *,
    together: int,
    positions: int = sys.maxsize,
) -> Shapes:
    """One size of each program, for rows like these.

    As many rows run at a time as are given to a call, fit the memory, and still make a step faster by sharing
    it; they have slots for their mean number of branches.

    Args:
      rows: lengths of the rows to come, or of a sample of them that has the longest.
      new_tokens: limit of a completion.
      together: rows of a call.
      positions: that the model has for these rows.
    Raises:
      InputError: not even one row on each piece of the mesh fits the memory.
    """
    rows = list(rows) or [RowLengths(1, [0])]
    fan_out = max(len(row.branches) for row in rows)
    branches = sum(len(row.branches) for row in rows) / len(rows)
    longest, shortest = (pick(row.tokens for row in rows) for pick in (max, min))
    mean = sum(row.tokens for row in rows) / len(rows)
    own = _in_blocks(new_tokens)
    shards, all_rows = memory.shards, -(-together // memory.shards)
    running = min(all_rows, max(1, int(_SLOTS.get(platform(), _MORE_SLOTS) / branches)))
    while True:  # of each piece of the mesh
        pack = _pack(longest, mean, running)
        shapes = Shapes(
            pack=pack,
            packed=min(running, -(-pack // max(1, shortest))),
            rows=(min(math.ceil(running * _RESIDENT), max(running, all_rows)) if running > 1 else 1) * shards,
            row=_in_blocks(longest),
            running=running * shards,
            slots=max(fan_out, math.ceil(running * branches)) * shards,
            fan_out=fan_out,
            widths=(own // 2, own) if platform() == "cpu" and own >= 4 * MOST_STEPS else (own,),
            given=positions - new_tokens,
        )
        needed = memory.needed(shapes)
        if needed <= memory.budget:
            return shapes
        if running == 1:
            raise InputError(
                f"memory_gb: one row of {longest} tokens, the prefix and what {fan_out} branches are given, "
                f"and {new_tokens} new tokens of each takes {needed / 1e9:.2g} GB of a device beside the "
                f"weights, over the budget of {memory.budget / 1e9:.2g} GB; raise memory_gb, or shorten the "
                "prompts or the replies"
            )
        running = max(1, min(running - 1, int(running * 0.8)))


def _pack(longest: int, mean: float, running: int) -> int:
    """A quarter of the rows that run, since so many leave and enter at a time; more where a run's price would
    else outweigh its tokens, fewer where they would take much memory."""
    tokens = min(max(running / 4 * mean, 8 * CALL_OVERHEAD_TOKENS), running * mean)
    most = _PREFILL_TOKENS.get(platform(), _FEWER_PREFILL_TOKENS)
    tokens = longest * max(
        1, min(math.ceil(tokens / longest), most // longest)
    )  # whole rows, if all are alike
    return round_up(tokens) if tokens <= block_size() else -(-tokens // block_size()) * block_size()


def _in_blocks(size: int) -> int:
    """Of a cache, that decoding reads in blocks where it is long."""
    return round_up(size, 16) if size <= 2 * KEY_BLOCK else -(-size // KEY_BLOCK) * KEY_BLOCK


def round_up(size: int, least: int = 8) -> int:
    """To a size that the machine's registers divide: of `least` on a CPU, of 128 elsewhere (0 stays)."""
    unit = least if platform() == "cpu" else 128
    return -(-size // unit) * unit
