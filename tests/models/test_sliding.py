"""Sliding attention where keys do not lie at their positions: prefixes, branches and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.kernels.segment import Segment
from srrl_jax.models import TreeBatch, branch_logprobs
from srrl_jax.models.tree import extend_branches, extend_prefix

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture
def tree():
    """Prefixes of 7 and 4 tokens in 9 slots, branches of 0 to 6 tokens in 7."""
    random = np.random.default_rng(0)
    return TreeBatch(
        jnp.asarray(random.integers(0, 96, (2, 9))),
        jnp.array([7, 4]),
        jnp.asarray(random.integers(0, 96, (2, 3, 7))),
        jnp.array([[5, 0, 3], [2, 6, 1]]),
    )


def flat(model, tree, new=()):
    """Logits of every prefix + branch + new tokens as a flat sequence, one row each.

    Returns for each row its tokens, logits and where the branch starts; rows in the order of branches.
    """
    rows = []
    for n, b in np.ndindex(tree.branch_lengths.shape):
        start, length = tree.prefix_lengths[n], tree.branch_lengths[n, b]
        end = np.asarray(new)[n, b] if len(new) else []
        rows.append(np.concatenate([tree.prefix[n, :start], tree.branches[n, b, :length], end]).astype(int))
    size = max(map(len, rows))
    mask = np.arange(size) < np.array([len(row) for row in rows])[:, None]
    tokens = np.stack([np.pad(row, (0, size - len(row))) for row in rows])
    logits = np.asarray(jax.jit(lambda m, *x: m(x[0], mask=x[1]))(model, tokens, mask))
    starts = np.repeat(np.asarray(tree.prefix_lengths), tree.branches.shape[1])
    return [(row, logits[i, : len(row)], starts[i]) for i, row in enumerate(rows)]


def test_window_counts_the_token_itself(tiny):
    """A one-layer network with window 3 sees two tokens back, no further."""
    kind = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    model = tiny(**{**SLIDING, **kind})
    tokens = np.arange(8)[None]
    changed = np.where(np.eye(8, dtype=bool), 50, tokens)  # row i has another token i
    logits = model(np.concatenate([tokens, changed]))
    changed = np.abs(logits[1:] - logits[:1]).max(-1)[:6] > 0
    for i, moved in enumerate(changed):
        np.testing.assert_array_equal(np.flatnonzero(moved), [i, i + 1, i + 2])


def test_tree_equals_flat(tiny, tree):
    model = tiny(**SLIDING)
    logprobs, _ = jax.jit(lambda m, t: branch_logprobs(m, t, remat="full"))(model, tree)
    for i, (tokens, logits, start) in enumerate(flat(model, tree)):
        expected = jax.nn.log_softmax(logits)[np.arange(start - 1, len(tokens) - 1), tokens[start:]]
        actual = logprobs.reshape(6, -1)[i, : len(expected)]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_decoding_equals_flat(tiny, tree, relative_error):
    """New tokens continue branches of many lengths, their keys beyond the branches' padding."""
    model = tiny(**SLIDING)
    new = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 3, 3)))

    @jax.jit
    def decode(model):
        last, prefix, _ = extend_prefix(model, tree)
        branches, own, _ = extend_branches(model, tree, prefix)
        ends = jnp.maximum(tree.branch_lengths - 1, 0)[..., None, None]
        given = jnp.take_along_axis(branches, ends, axis=2)[:, :, 0]
        hidden = [jnp.where(tree.branch_lengths[..., None] > 0, given, last[:, None])]
        context = [prefix, own]
        for i in range(3):
            positions = (tree.prefix_lengths[:, None] + tree.branch_lengths + i)[..., None]
            seen = jnp.ones((2, 3, 1), bool)
            step, (k, v), _ = model.extend(new[..., i : i + 1], positions, seen, context)
            context.append(Segment(k, v, seen[:, :, None], positions))
            hidden.append(step[:, :, 0])
        return model.logits(jnp.stack(hidden, axis=2)).reshape(6, 4, -1)

    for logits, (_, expected, _) in zip(decode(model), flat(model, tree, new), strict=True):
        assert relative_error(logits, expected[-4:]) < 1e-5


def test_context_needs_positions(tiny, tree):
    model = tiny(**SLIDING)
    _, prefix, _ = jax.eval_shape(lambda: extend_prefix(model, tree))
    prefix = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), prefix)._replace(positions=None)
    with pytest.raises(InputError, match="no positions"):
        extend_branches(model, tree, prefix)
    jax.eval_shape(lambda: extend_branches(tiny(), tree, prefix))
