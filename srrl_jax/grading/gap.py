"""What 8 bits change: the log-probabilities of replies as they were sampled, and as the weights have them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from srrl_jax.models import TreeBatch, branch_logprobs
from srrl_jax.parallel import to_host
from srrl_jax.sampling import Completion, Sampler


class Gap(NamedTuple):
    """|log-probability at sampling - that of the weights as they are|, over the tokens of a reply."""

    mean: float
    max: float


def reply_gaps(
    sampler: Sampler,
    params: Any,
    prefixes: Sequence[Sequence[int]],
    branches: Sequence[Sequence[int]],
    replies: Sequence[Completion],
) -> list[Gap]:
    """Of the first replies, as many as a pack of `sampler` has room for, in one pass without 8 bits.

    Args:
      sampler: that drew the replies.
      params: `nnx.state` of the model, from which it did.
      prefixes, branches: what was given to each reply, token ids.
    """
    size, own = len(sampler.shared) + sampler.shapes.row, sampler.shapes.own
    rows = sampler.shards * max(1, sampler.shapes.pack // sampler.shapes.row)
    taken = list(zip(prefixes, branches, replies, strict=True))[:rows]
    tree = TreeBatch(
        np.zeros((rows, size), np.int32),
        np.ones(rows, np.int32),
        np.zeros((rows, 1, own), np.int32),
        np.zeros((rows, 1), np.int32),
    )
    for row, (prefix, branch, reply) in enumerate(taken):
        given = [*prefix, *branch]
        tree.prefix[row, : len(given)], tree.prefix_lengths[row] = given, len(given)
        tree.branches[row, 0, : len(reply.tokens)] = reply.tokens
        tree.branch_lengths[row, 0] = len(reply.tokens)
    temperature = sampler.sampling.temperature or 1.0  # greedy sampling reports temperature 1
    found = to_host(_logprobs(sampler.graphdef, params, sampler._place(tree), temperature))
    gaps = [
        np.abs(found[row, 0, : len(reply.tokens)] - reply.logprobs) for row, (*_, reply) in enumerate(taken)
    ]
    return [Gap(float(gap.mean()), float(gap.max())) for gap in gaps]


@partial(jax.jit, static_argnames="graphdef")
def _logprobs(graphdef, params, tree: TreeBatch, temperature) -> jax.Array:
    return branch_logprobs(nnx.merge(graphdef, params), tree, temperature)[0]
