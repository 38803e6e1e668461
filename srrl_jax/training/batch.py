"""From completions to the arrays of an update."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from srrl_jax.models import TreeBatch
from srrl_jax.sampling import Completion
from srrl_jax.training.shapes import UpdateShapes


class UpdateBatch(NamedTuple):
    """N prompts with their groups; a leading [microbatches, ...] axis where it is scanned over.

    Shapes: `tree` with branches [N, G, L]; `mask` bool [N, G, L], true at completion tokens that
    count; `logprobs` float32 [N, G, L] at sampling; `old_logprobs` [N, G, L], those that ratios are
    taken against; `advantages` float32 [N, G]; `reference_logprobs` float32 [N, G, L], zero when
    there is no KL penalty; `taught` bool [N, G], true where the completion is a teacher's reply.
    """

    tree: TreeBatch
    mask: jax.Array
    logprobs: jax.Array
    old_logprobs: jax.Array
    advantages: jax.Array
    reference_logprobs: jax.Array
    taught: jax.Array


def pack_groups(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
    scored: np.ndarray,
    shapes: UpdateShapes,
) -> UpdateBatch:
    """Pads a step's prompts and completions; advantages left at zero.

    Args:
      scored: bool [N, G], false where a completion has no reward and so must not count.
    """
    n, g = scored.shape
    p, size = shapes.prompt, shapes.completion(max(len(c.tokens) for group in groups for c in group))
    tree = TreeBatch(
        np.zeros((n, p), np.int32),
        np.array([len(prompt) for prompt in prompts], np.int32),
        np.zeros((n, g, size), np.int32),
        np.array([[len(c.tokens) for c in group] for group in groups], np.int32),
    )
    logprobs = np.zeros((n, g, size), np.float32)
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        tree.prefix[i, : len(prompt)] = prompt
        for j, completion in enumerate(group):
            tree.branches[i, j, : len(completion.tokens)] = completion.tokens
            logprobs[i, j, : len(completion.tokens)] = completion.logprobs
    mask = (np.arange(size) < tree.branch_lengths[..., None]) & scored[..., None]
    advantages, reference = np.zeros((n, g), np.float32), np.zeros_like(logprobs)
    return UpdateBatch(tree, mask, logprobs, logprobs, advantages, reference, np.zeros((n, g), bool))


def split_batch(batch: UpdateBatch, minibatches: int, microbatch: int) -> list[UpdateBatch]:
    """Arrays [N, ...] -> `minibatches` batches of [N / minibatches / microbatch, microbatch, ...]."""

    def cut(x, i):
        return np.split(x, minibatches)[i].reshape(-1, microbatch, *x.shape[1:])

    return [jax.tree.map(lambda x, i=i: cut(x, i), batch) for i in range(minibatches)]
