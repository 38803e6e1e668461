"""Programs for GPUs that are not here, compiled by JAX's CUDA plugin from a description of the card."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from srrl_jax.models import Qwen3
from srrl_jax.models.presets import PRESETS
from srrl_jax.parallel import MeshConfig, make_mesh, shardings
from srrl_jax.planning.collectives import _INSTRUCTION, KINDS, _computations, collectives
from srrl_jax.planning.groups import groups_of, share_outside
from srrl_jax.planning.programs import Compiler
from srrl_jax.programs import placed
from srrl_jax.sampling import RowLengths, Sampler

pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture(scope="module")
def setup(planned, h100, make_setup):
    """In bfloat16, so with cuDNN's attention; fsdp over the two nodes, tensor within each."""
    return make_setup(planned("dtype=bfloat16"), h100.devices())


@pytest.fixture(scope="module")
def rollout(setup, h100):
    compiler = Compiler("rollout", h100.ici_group_size)
    with jax.set_mesh(setup.mesh):
        for program, held in setup.programs("rollout").values():
            compiler(program, held)
    return compiler


def test_the_programs_of_a_rollout_on_gpus(rollout):
    names = [compiled.name.removeprefix("rollout/") for compiled in rollout.found]
    assert names == ["relayout", "empty caches", "prefill", "decode"]
    assert all(compiled.peak_bytes > compiled.held_bytes > 0 for compiled in rollout.found)
    assert "attend_packed" in rollout.texts["rollout/prefill"]


def kernels_of_a_token(text: str) -> int:
    """Those of the innermost loop of a compiled module of decoding."""
    counts = []
    for name, body in _computations(text)[0].items():
        if re.search(rf"body=%?{re.escape(name)}[,\s]", text):
            operations = [m[3] for line in body if (m := _INSTRUCTION.match(line))]
            counts.append(sum(x in ("fusion", "custom-call", "copy", "conditional") for x in operations))
    return max(counts)


@pytest.mark.slow
def test_a_token_of_28_layers_takes_at_most_350_kernels(h100):
    model = nnx.eval_shape(lambda: Qwen3(PRESETS["qwen3-0.6b"], rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    mesh = make_mesh(MeshConfig(), h100.devices()[:1])
    with jax.set_mesh(mesh):
        rows = [RowLengths(256, [0] * 4)] * 32
        sampler = Sampler(model, rows, new_tokens=512, stop_ids=[1], mesh=mesh, memory_gb=40)
        params = placed(nnx.state(model), shardings(nnx.state(model), mesh))
        (decode,) = (p for p in sampler.programs(params) if p.kind == "decode")
        text = decode.lower().compile().as_text()
    assert 28 * 8 < kernels_of_a_token(text) <= 350


def test_no_device_makes_the_keys_of_all_rows(rollout, setup):
    c, shards, tokens = setup.model.config, setup.rollout.shards, setup.rollout.shapes.pack
    text, (layers, heads) = rollout.texts["rollout/prefill"], (c.num_hidden_layers, c.num_key_value_heads)
    own = layers * shards // 2 * tokens * heads // 2 * c.head_dim
    found = re.findall(rf"\[({layers},[\d,]*\b{tokens}\b[\d,]*)\]", text)
    found = {math.prod(map(int, sizes.split(","))) for sizes in found}  # weights among them
    assert own in found and not {2 * own, 4 * own} & found


def test_weights_cross_the_network_before_decoding_and_sums_never(rollout):
    found = {compiled.name.removeprefix("rollout/"): compiled for compiled in rollout.found}
    assert found["relayout"].network_bytes == found["relayout"].collective_bytes["all-gather"] > 0
    sums = [c for c in collectives(rollout.texts["rollout/decode"]) if c.loops and c.kind == "all-reduce"]
    assert sums and all(share_outside(c.kind, c.groups, ici_group_size=2) == 0 for c in sums)
    assert found["decode"].network_bytes < found["relayout"].network_bytes / 50


def beside(text: str) -> list[tuple[str, bool, bool]]:
    """Each collective that starts and ends apart: its kind, whether it crosses between the nodes, and
    whether anything is computed in between."""
    found = []
    for body in _computations(text)[0].values():
        started, work = {}, 0
        for name, _, operation, rest in (m.groups() for line in body if (m := _INSTRUCTION.match(line))):
            operand, kind = re.match(r"%?([\w.-]*)", rest)[1], operation.removesuffix("-start")
            if kind in KINDS:
                started[name] = work, share_outside(kind, groups_of(rest), ici_group_size=2) > 0
            elif operation.endswith("-done") and operand in started:
                before, crosses = started[operand]
                found.append((operation.removesuffix("-done"), crosses, work > before))
            work += operation in ("fusion", "custom-call", "dot", "while")
    return found


def test_what_an_update_sends_goes_beside_its_products(setup, h100):
    """Weights are cut and summed over `fsdp`, here between the nodes, while other products run: the
    compiler's own doing."""
    compiler = Compiler("update", h100.ici_group_size)
    with jax.set_mesh(setup.mesh):
        compiler(*setup.programs("update")["update"])
    sent = beside(compiler.texts["update/update"])
    assert sum(computed for *_, computed in sent) > len(sent) / 2
    gradients = [computed for kind, crosses, computed in sent if kind == "reduce-scatter" and crosses]
    assert gradients and all(gradients)
