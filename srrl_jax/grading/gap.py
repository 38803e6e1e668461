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
    """Of the first replies, as many as the largest prefill of `sampler` has rows, in one pass without 8 bits.

    Args:
      sampler: that drew the replies.
      params: `nnx.state` of the model, from which it did.
      prefixes, branches: what was given to each reply, token ids.
    """
    rows, size, own = sampler.shapes.prefill[-1].rows, sampler.longest_prefix, sampler.shapes.own
    taken = list(zip(prefixes, branches, replies, strict=True))[:rows]
    tree = TreeBatch(
        np.zeros((rows, size), np.int32),
        np.ones(rows, np.int32),
        np.zeros((rows, 1, own), np.int32),
        np.zeros((rows, 1), np.int32),
    )
    for row, (prefix, branch, reply) in enumerate(taken):
        whole = [*branch, *reply.tokens]
        tree.prefix[row, : len(prefix)], tree.prefix_lengths[row] = prefix, len(prefix)
        tree.branches[row, 0, : len(whole)], tree.branch_lengths[row, 0] = whole, len(whole)
    temperature = sampler.sampling.temperature or 1.0  # greedy sampling reports temperature 1
    found = to_host(_logprobs(sampler.graphdef, params, sampler._place(tree), temperature))
    gaps = [
        np.abs(found[row, 0, len(branch) : len(branch) + len(reply.tokens)] - reply.logprobs)
        for row, (_, branch, reply) in enumerate(taken)
    ]
    return [Gap(float(gap.mean()), float(gap.max())) for gap in gaps]


@partial(jax.jit, static_argnames="graphdef")
def _logprobs(graphdef, params, tree: TreeBatch, temperature) -> jax.Array:
    return branch_logprobs(nnx.merge(graphdef, params), tree, temperature)[0]
