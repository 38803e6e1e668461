"""The shapes that a sampler is compiled for, planned from the lengths of the rows that it serves."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srrl_jax.errors import InputError
from srrl_jax.models import counts
from srrl_jax.models.attention import BLOCK, platform
from srrl_jax.models.config import Qwen3Config
from srrl_jax.sampling.decoder import KEY_BLOCK

# A run of a program reads all weights, whatever its size: on the chips at hand that is the time of about
# so many tokens.
PRICE = 256
MOST_STEPS = 32  # of decoding between two looks of the host: the price of one look, spread
_SHAPES, _SHAPES_WITH_LANES = 2, 4  # prefill programs of a sampler, without and with given branches
_CUTS = 40  # sizes that are tried in each direction
_WORTH = 0.97  # what one more program leaves to compute, at most
# Most tokens of a prefill with more than one row for each device; a GPU copies all weights for each.
_PREFILL_TOKENS = {"gpu": 16384}
_FEWER_PREFILL_TOKENS = 8192
_SLOTS = {"cpu": 512}  # most branches at a time for each piece of a batch
_MORE_SLOTS = 1024  # elsewhere


class RowLengths(NamedTuple):
    """Tokens of a row's prefix, and of what each of its branches is given."""

    prefix: int
    branches: Sequence[int]

    def own(self, new_tokens: int) -> int:
        """Of a branch in the cache at most: what is given, with the prefix's last token where some branch is
        given none, and all that is drawn but the last."""
        return max(self.branches) + (min(self.branches) == 0) + new_tokens - 1


class PrefillShape(NamedTuple):
    """`rows` prefixes of `prefix` tokens enter together; what the branches of a row are given lies in `lanes`
    lanes of `lane` tokens."""

    rows: int
    prefix: int
    lanes: int
    lane: int

    def __str__(self) -> str:
        lanes = f" + {self.lanes} x {self.lane}" if self.lanes else ""
        return f"{self.rows} x ({self.prefix}{lanes})"

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.prefix + self.lanes * self.lane


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All sizes of a sampler's programs.

    Attributes:
      prefill: from the smallest to the one that holds every row.
      rows: prefixes in the cache.
      running: rows that run at a time.
      slots: branches that run at a time.
      fan_out: most branches of a row.
      widths: sizes that the cache of branches grows to, the last for all their tokens, given and new. One but
        on a CPU, which is slow to read what is not there yet.
      apart: each branch has a lane of its own, for kernels that cannot tell branches of a lane apart.
    """

    prefill: tuple[PrefillShape, ...]
    rows: int
    running: int
    slots: int
    fan_out: int
    widths: tuple[int, ...]
    apart: bool = False

    @property
    def own(self) -> int:
        """Tokens of a branch in the cache."""
        return self.widths[-1]

    @property
    def prefix(self) -> int:
        """Tokens of a prefix in the cache."""
        return _in_blocks(self.prefill[-1].prefix)

    def smallest(self, row: RowLengths, new_tokens: int) -> int | None:
        """The index of the smallest prefill shape that holds a row; None where the row does not fit."""
        if len(row.branches) > self.fan_out or row.own(new_tokens) > self.own:
            return None
        lanes = lanes_needed(row.branches, self.prefill[-1].lane, self.apart)  # all have lanes alike
        for index, shape in enumerate(self.prefill):
            if row.prefix <= shape.prefix and lanes <= shape.lanes:
                return index
        return None


@dataclasses.dataclass(frozen=True)
class Memory:
    """What sampling takes of a device beside the weights, by a formula.

    Attributes:
      budget: bytes that it may take; by default half of the device's memory, of the machine's on a CPU.
      tensor: size of the mesh axis; heads and vocabulary that it does not divide are whole everywhere.
      shards: pieces that rows are cut into.
      has_scores: false with an attention kernel that never writes scores down.
    """

    config: Qwen3Config
    dtype: jnp.dtype
    budget: int
    tensor: int = 1
    shards: int = 1
    has_scores: bool = True

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
        cached = key_values * (shapes.rows * shapes.prefix + shapes.slots * shapes.own)
        enter = 0
        for shape in shapes.prefill:
            # Scores exist for `BLOCK` queries, and once more as weights.
            scores = max(
                min(shape.prefix, BLOCK) * shape.prefix,
                shape.lanes * min(shape.lane, BLOCK) * (shape.prefix + shape.lane),
            )
            scores = 2 * 4 * heads * scores if self.has_scores else 0
            enter = max(enter, shape.rows * (shape.tokens * (key_values + layer) + scores))
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
    apart: bool = False,
    by_mean: bool = False,
) -> Shapes:
    """Few shapes with little padding, for rows like these.

    Each row is prefilled in the smallest of a few shapes that holds it; these are chosen so that little is
    padded. As many rows run at a time as are given to a call, fit the memory, and still make
    a step faster by sharing it.

    Args:
      rows: lengths of the rows to come, or of a sample of them that has the longest.
      new_tokens: limit of a completion.
      together: rows of a call.
      apart: see `Shapes`.
      by_mean: rows have slots for their mean number of branches and not for the most, where attention is not
        computed for the branches that a row lacks: the memory then holds more rows.
    Raises:
      InputError: not even one row on each piece of the mesh fits the memory.
    """
    rows = list(rows) or [RowLengths(1, [0])]
    fan_out = max(len(row.branches) for row in rows)
    longest = max(max(row.branches) for row in rows)
    lane, own = round_up(longest), _in_blocks(max(row.own(new_tokens) for row in rows))
    narrow = (
        [round_up(own // part) for part in (4, 2)] if platform() == "cpu" and own >= 4 * MOST_STEPS else []
    )
    widths = (*(width for width in narrow if longest + MOST_STEPS <= width < own), own)
    classes = _classes(rows, lane, apart, fan_out)
    shards = memory.shards
    branches = sum(len(row.branches) for row in rows) / len(rows) if by_mean else fan_out
    most = int(_SLOTS.get(platform(), _MORE_SLOTS) * shards / branches)
    running = -(-min(together, max(1, most)) // shards) * shards
    while True:
        prefill = tuple(
            PrefillShape(_rows_of_prefill(prefix + lanes * lane, running, share, shards), prefix, lanes, lane)
            for prefix, lanes, share in classes
        )
        # Prefixes stay while one of their branches runs: with more of them no slot waits for a place.
        resident = min(2 * running, max(running, -(-together // shards) * shards))
        slots = max(fan_out, math.ceil(running // shards * branches)) * shards
        shapes = Shapes(prefill, resident, running, slots, fan_out, widths, apart)
        needed = memory.needed(shapes)
        if needed <= memory.budget:
            return shapes
        if running == shards:
            raise InputError(
                f"memory_gb: one row of {classes[-1][0]} prefix tokens and {fan_out} branches of {longest} "
                f"given and {new_tokens} new tokens takes {needed / 1e9:.2g} GB of a device beside the "
                f"weights, over the budget of {memory.budget / 1e9:.2g} GB; raise memory_gb, or shorten the "
                "prompts or the replies"
            )
        running = max(shards, running // 2 // shards * shards)


def _rows_of_prefill(tokens: int, running: int, share: float, shards: int) -> int:
    """A quarter of those that run, since so many leave and enter at a time; more where a run's price would
    else outweigh its tokens, fewer where they would take much memory, or where few rows are so long."""
    rows = max(running // 4, -(-8 * PRICE * shards // tokens))
    most = _PREFILL_TOKENS.get(platform(), _FEWER_PREFILL_TOKENS)
    rows = min(rows, most * shards // tokens, running, math.ceil(share * running))
    return -(-max(1, rows) // shards) * shards


def _classes(rows: list[RowLengths], lane: int, apart: bool, fan_out: int) -> list[tuple[int, int, float]]:
    """Prefix and lanes of each prefill shape, and the share of the rows that it is for; the last holds all.

    Each in turn is put where it then leaves least to compute, the others being where they are.
    """
    prefix = np.array([round_up(row.prefix) for row in rows])
    lanes = np.array([lanes_needed(row.branches, lane, apart) for row in rows])
    if apart and lanes.any():
        lanes[:] = fan_out
    sizes = map(np.unique, (prefix, lanes))
    sizes = [x[np.unique(np.linspace(0, len(x) - 1, _CUTS).round().astype(int))] for x in sizes]
    candidates = [(int(p), int(j)) for p, j in itertools.product(*sizes)]
    costs = np.array([np.where((prefix <= p) & (lanes <= j), p + j * lane, np.inf) for p, j in candidates])
    chosen = [len(candidates) - 1]  # which holds all

    def best_beside(others: list[int]) -> tuple[float, int]:
        totals = np.minimum(costs, costs[others].min(0)).sum(1)
        return float(totals.min()), int(totals.argmin())

    total = costs[-1].sum()
    for _ in range((_SHAPES_WITH_LANES if lanes.any() else _SHAPES) - 1):
        more = [*chosen, best_beside(chosen)[1]]
        for _, i in itertools.product(range(3), range(1, len(more))):
            left, more[i] = best_beside(more[:i] + more[i + 1 :])
        if left > _WORTH * total:
            break
        chosen, total = more, left
    chosen = [candidates[i] for i in chosen]
    chosen.sort(key=lambda each: each[0] + each[1] * lane)
    fits = np.stack([(prefix <= p) & (lanes <= j) for p, j in chosen])
    shares = np.bincount(fits.argmax(0), minlength=len(chosen)) / len(rows)
    return [(*sizes, float(share)) for sizes, share in zip(chosen, shares, strict=True)]


def place_in_lanes(lengths: Sequence[int], lane: int, apart: bool) -> list[tuple[int, int]]:
    """The lane, of `lane` tokens, and the first place in it of each of a row's branches.

    The longest first, each into the first lane with room.
    """
    if apart:
        return [(i, 0) for i in range(len(lengths))]
    places, taken = [(0, 0)] * len(lengths), []
    for branch in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[branch]
        index = next((i for i, used in enumerate(taken) if used + length <= lane), len(taken))
        if index == len(taken):
            taken.append(0)
        places[branch] = index, taken[index]
        taken[index] += length
    return places


def lanes_needed(lengths: Sequence[int], lane: int, apart: bool) -> int:
    """Of a row; more than any shape has where a branch is longer than a lane."""
    if max(lengths) == 0:
        return 0
    if max(lengths) > lane:
        return len(lengths) + 1
    return 1 + max(index for index, _ in place_in_lanes(lengths, lane, apart))


def _in_blocks(size: int) -> int:
    """Of a cache, that decoding reads in blocks where it is long."""
    return round_up(size) if size <= KEY_BLOCK else -(-size // KEY_BLOCK) * KEY_BLOCK


def round_up(size: int) -> int:
    """To a size that the machine's registers divide: of 8 on a CPU, of 128 elsewhere (0 stays)."""
    unit = 8 if platform() == "cpu" else 128
    return -(-size // unit) * unit
