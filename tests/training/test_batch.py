import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.parallel import make_mesh
from srrl_jax.sampling import Completion
from srrl_jax.training.batch import pack_groups, split_batch
from srrl_jax.training.learner import build_model
from srrl_jax.training.shapes import UpdateShapes, plan_update, sampling_budget


def completion(*tokens: int) -> Completion:
    return Completion(np.array(tokens, np.int32), -0.1 * np.array(tokens, np.float32), False)


PROMPTS = [[5, 6, 7], [8]]
GROUPS = [[completion(1, 2), completion(3)], [completion(4, 5, 6), completion(9, 9)]]
SCORED = np.array([[True, True], [False, True]])


def test_prompts_and_completions_are_padded_to_what_holds_the_longest():
    batch = pack_groups(PROMPTS, GROUPS, SCORED, UpdateShapes(4, (3, 6), 1))
    assert batch.tree.prefix.shape == (2, 4) and batch.tree.branches.shape == (2, 2, 3)
    assert batch.tree.prefix.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch.tree.prefix_lengths.tolist() == [3, 1]
    assert batch.tree.branches.tolist() == [[[1, 2, 0], [3, 0, 0]], [[4, 5, 6], [9, 9, 0]]]
    assert batch.tree.branch_lengths.tolist() == [[2, 1], [3, 2]]
    assert batch.logprobs[0, 0] == pytest.approx([-0.1, -0.2, 0.0])
    assert batch.advantages.shape == (2, 2) and not batch.advantages.any()
    assert batch.reference_logprobs.shape == (2, 2, 3) and not batch.reference_logprobs.any()
    assert batch.logprobs.dtype == batch.advantages.dtype == np.float32


def test_the_mask_leaves_out_padding_and_completions_without_a_reward():
    mask = pack_groups(PROMPTS, GROUPS, SCORED, UpdateShapes(4, (4,), 1)).mask
    assert mask.tolist() == [
        [[True, True, False, False], [True, False, False, False]],
        [[False] * 4, [True, True, False, False]],
    ]


@pytest.mark.parametrize(
    ("overrides", "memory", "microbatch"),
    [
        ((), 2**40, 8),
        ((), 2**20, 1),  # not even one fits by the formula; the compiler has the last word
        (("optimizer.minibatches=2",), 2**40, 4),
        (("optimizer.microbatch=2",), 2**20, 2),
        (("rollout.max_new_tokens=3000",), 2**40, 1),  # enough tokens for a device
    ],
)
def test_a_microbatch_is_what_fits(recipe, overrides, memory, microbatch):
    whole = ("prompts_per_step=8", "optimizer.microbatch=null", "optimizer.minibatches=1", "group_size=4")
    config = recipe("unused", *whole, *overrides)
    found = plan_update(config, build_model(config), 33, make_mesh(), memory)
    assert (found.prompt, found.microbatch) == (40, microbatch)
    assert found.completions == ((1000, 3000) if overrides == ("rollout.max_new_tokens=3000",) else (64,))
    assert found.completion(7) == found.completions[0] and found.completion(64) == found.completions[0]


def test_the_backward_pass_computes_again_what_does_not_fit(recipe):
    """Least of all first, unless that leaves room for a few tokens alone."""
    whole = ("prompts_per_step=8", "optimizer.microbatch=null", "optimizer.minibatches=1", "group_size=4")
    config = recipe("unused", *whole, "optimizer.remat=auto", "rollout.max_new_tokens=3000")
    model, mesh = build_model(config), make_mesh()
    found = [plan_update(config, model, 33, mesh, int(1.02**k)) for k in range(1400, 700, -1)]
    ways = [shapes.remat for shapes in found]
    assert ways == sorted(ways, key=["none", "dots", "full"].index) and set(ways) == {"none", "dots", "full"}
    fixed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, remat="dots"))
    assert plan_update(fixed, model, 33, mesh, 2**20).remat == "dots"


@pytest.mark.parametrize("on_host", [False, True])
def test_sampling_takes_what_training_leaves(recipe, on_host):
    """Weights and their gradients' moments by hand: 4 bytes each, 2 with the first moment in bfloat16."""
    config = recipe("unused", "kl_coef=0.1", "optimizer.first_moment=bfloat16")
    if on_host:
        config = dataclasses.replace(
            config, reference="host", optimizer=dataclasses.replace(config.optimizer, moments="host")
        )
    model, memory = build_model(config), 10**8
    numbers = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    held = numbers * (4 + 4 + (0 if on_host else 4 + 2 + 4))  # learnt, as decoded; moments, reference
    free = sampling_budget(config, model, make_mesh(), memory)
    assert free * 1e9 == pytest.approx(min(0.9 * memory - held, memory / 2))
    with pytest.raises(InputError, match="^model: .*which leaves nothing to sample with; set .*moments=host"):
        sampling_budget(config, model, make_mesh(), held)


@pytest.mark.parametrize(("minibatches", "microbatch"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_split_keeps_every_prompt_once_and_in_order(minibatches, microbatch):
    prompts = [[row + 1] for row in range(4)]
    groups = [[completion(row, 1), completion(row, 2)] for row in range(4)]
    batch = pack_groups(prompts, groups, np.ones((4, 2), bool), UpdateShapes(2, (2,), 1))
    parts = split_batch(batch, minibatches, microbatch)
    assert len(parts) == minibatches
    for part in parts:
        assert part.mask.shape == (4 // minibatches // microbatch, microbatch, 2, 2)
        assert part.tree.prefix.shape == (*part.mask.shape[:2], 2)
    rows = np.concatenate([part.tree.prefix[..., 0].ravel() for part in parts])
    assert rows.tolist() == [1, 2, 3, 4]
