"""What the compiled programs of a small model on a small slice send and keep."""

import math

import jax
import pytest

from srrl_jax.planning import programs
from srrl_jax.planning.collectives import array_bytes, collectives
from srrl_jax.planning.programs import Compiler

pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture(scope="module")
def rollout(setup):
    compiler = Compiler("rollout")
    with jax.set_mesh(setup.mesh):
        programs.sampling(compiler, setup, setup.config.prompts_per_step)
    return compiler


def test_the_programs_of_a_rollout(rollout):
    names = [compiled.name.removeprefix("rollout/") for compiled in rollout.found]
    assert names == ["unstack", "empty", "prefill", "admit", "resize", "decode"]
    assert all(compiled.peak_bytes > compiled.held_bytes > 0 for compiled in rollout.found)


def test_no_weights_are_gathered_while_decoding(rollout, setup):
    """Layout of rollouts: fsdp cuts no weight, so what is gathered in the loop are a few numbers a slot."""
    smallest = min(math.prod(x.shape) * 4 for x in jax.tree.leaves(setup.params) if x.ndim == 3) // 16
    found = collectives(rollout.texts["rollout/decode"])
    inside = [c for c in found if c.loops and c.kind != "all-reduce"]
    assert any(c.loops and c.kind == "all-reduce" for c in found), "tensor parallelism sums in the loop"
    assert all(sum(map(array_bytes, c.arrays)) < smallest for c in inside)
    moved = collectives(rollout.texts["rollout/unstack"])
    assert sum(c.bytes for c in moved if c.kind == "all-gather") > smallest, "they are gathered before it"


def test_no_device_holds_the_cache_of_another(rollout, setup):
    slots, heads = 8 * 4, setup.model.config.num_key_value_heads
    for name in ("decode", "admit", "resize"):
        assert f"[{slots // 2},{heads // 2},32," in rollout.texts[f"rollout/{name}"]
        assert f"[{slots},{heads}," not in rollout.texts[f"rollout/{name}"]


def test_an_update_gives_back_what_it_took(setup):
    """Else the second update would compile again, and nothing would be donated."""
    compiler = Compiler("update")
    with jax.set_mesh(setup.mesh):
        program = programs.make_update(
            setup.graphdef, setup.config, programs.make_optimizer(setup.config.optimizer)
        )
        params, opt_state, _ = compiler(
            program, setup.params, setup.opt_state, programs.largest_minibatch(setup), held=()
        )
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, len(a.shape)), (params, opt_state),
        (setup.params, setup.opt_state),
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
