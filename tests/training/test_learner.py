"""In which types and memories the weights and the moments of training lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.parallel import make_mesh
from srrl_jax.run import train
from srrl_jax.sampling import Completion
from srrl_jax.training.batch import pack_groups, split_batch
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.update import completion_logprobs

from .conftest import FOUR


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_not_learnt_lies_in_the_type_of_the_computation(recipe, rank):
    """That changes no bit: a forward pass rounds weights of float32 all the same."""
    config = recipe("unused", "dtype=bfloat16", "kl_coef=0.1", f"lora.rank={rank}")
    with jax.set_mesh(mesh := make_mesh(config.mesh)):
        learner = Learner(build_model(config), config, mesh, longest_prompt=36)
        learnt = learner.init_state().params
        frozen, policy = learner.frozen, learner.policy(learnt)
        assert {x.dtype for x in jax.tree.leaves(learnt)} == {jnp.dtype("float32")}
        for weights in (frozen, policy):
            _, rest = nnx.split_state(weights, nnx.LoRAParam, ...)
            assert {x.dtype for x in jax.tree.leaves(rest)} == {jnp.dtype("bfloat16")}

        group = [Completion(np.arange(3, 9, dtype=np.int32), np.zeros(6, np.float32), False)] * 2
        batch = pack_groups([[5, 6, 7]], [group], np.ones((1, 2), bool), learner.shapes)
        (part,) = split_batch(batch, 1, 1)
        whole = nnx.state(load_model(config.model))
        whole = nnx.merge_state(whole, learnt) if rank else whole
        expected = completion_logprobs(nnx.graphdef(build_model(config)), whole, part, 1.0)
        for weights in (frozen, policy):
            found = completion_logprobs(nnx.graphdef(build_model(config)), weights, part, 1.0)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.slow
def test_moments_may_lie_in_host_memory(recipe, finished, logs, tmp_path):
    """A run that was stopped and goes on is, to the bit, one with its moments on the devices."""
    for steps in (2, 4):
        train(recipe(tmp_path, *FOUR, "optimizer.moments=host", f"steps={steps}"))
    for there, here in zip(logs(tmp_path), logs(finished[0]), strict=True):
        assert there == here != []
