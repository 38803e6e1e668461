import dataclasses
import json
import math
import subprocess
import sys

import jax
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from srrl_jax.cli import app
from srrl_jax.errors import InputError
from srrl_jax.models import counts
from srrl_jax.parallel import chips
from srrl_jax.parallel.chips import GIB
from srrl_jax.planning import plan as planning
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import Assumptions, make_plan, model_config
from srrl_jax.planning.programs import Compiled, bytes_here
from srrl_jax.planning.table import render
from srrl_jax.training.learner import Learner, build_model

MEANS = Assumptions(
    completion=32, verdict=10, criteria=4, longest_prompt=80, longest_criterion=16, most_criteria=8
)


@pytest.fixture
def stand_in(monkeypatch):
    """Compiles nothing: each program is said to take this many GiB (None: refused). Counts its calls."""
    calls = []

    def use(gib: float | None):
        def compiled(compiler, setup):
            name = compiler.group
            calls.append(name)
            program = {"rollout": "decode", "grade": "decode", "logprob": "log-probabilities"}.get(name, name)
            peak = None if gib is None else int(gib * GIB)
            refusal = "RESOURCE_EXHAUSTED: out of memory" if gib is None else ""
            sent = {"all-gather": 4e9}
            outside = 1e9 if compiler.ici_group_size < setup.mesh.size else 0.0
            found = Compiled(f"{name}/{program}", peak, 0, sent, outside, "bf16[7,9]", 1.0, refusal)
            compiler.found.append(found)

        monkeypatch.setattr(planning, "_compile", compiled)
        monkeypatch.setattr(Topology, "devices", lambda self: jax.devices() * self.size)
        return calls

    return use


def shown(plan) -> str:
    console = Console(record=True, width=300)
    console.print(render(plan))
    return console.export_text()


@pytest.mark.parametrize("text", ["v5p", "v9:2x2", "v5p:4x", "4x4"])
def test_an_unknown_topology_is_refused(text):
    with pytest.raises(InputError, match=r"--topology .*v5p:4x4x4"):
        Topology.parse(text)


def test_a_plan_that_fits(stand_in, planned):
    stand_in(1.0)
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS)
    assert plan.fits and plan.free == pytest.approx(1 - 1 / 15.75)
    phases = plan.to_dict()["phases"]
    assert list(phases) == ["rollout/decode", "grade/decode", "logprob/log-probabilities", "update/update"]
    keys = {"fits", "peak_hbm_bytes", "hbm_bytes", "flops", "collective_bytes", "predicted_s"}
    assert all(keys <= phase.keys() for phase in phases.values())
    # A chunk is 32 tokens: all 8 prompts run at once, to their limit of 64; so do 32 responses, with a limit
    # of 20 (one chunk).
    assert phases["rollout/decode"]["runs"] == 2
    assert phases["grade/decode"]["runs"] == 1
    assert phases["update/update"]["runs"] == 1
    total = sum(phase["runs"] * phase["predicted_s"] for phase in phases.values())
    assert plan.to_dict()["step"]["predicted_s"] == pytest.approx(total)
    assert plan.to_dict()["run"]["hours"] == pytest.approx(total * 60 / 3600)


def test_time_is_that_of_the_slowest_part(stand_in, planned):
    """4 GB to send take 20 ms on links of 200 GB/s, longer than the tiny model computes."""
    stand_in(1.0)
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS)
    assert [p.predicted_s for p in plan.phases] == pytest.approx([4e9 / 200e9] * 4)


@pytest.mark.parametrize(("gib", "words"), [(16.0, "needs 16.00 GiB"), (None, "RESOURCE_EXHAUSTED")])
def test_a_plan_that_does_not_fit_says_what_would_help(stand_in, planned, gib, words):
    stand_in(gib)
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS)
    text = shown(plan)
    assert not plan.fits
    line = next(line for line in text.splitlines() if line.startswith("update/update does not fit"))
    assert words in line and "bf16[7,9]" in line and "optimizer.microbatch" in line


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ((), {"rollout", "grade", "logprob", "update"}),
        (("reference=host",), {"grade", "logprob"}),
        (("reference=host", "eval.frozen=false"), {"logprob"}),
        (("kl_coef=0", "eval.frozen=false"), set()),
    ],
)
def test_the_reference_counts_while_it_is_on_the_devices(planned, make_setup, overrides, groups):
    config = planned("mesh.fsdp=1", "mesh.tensor=1", *overrides)
    setup = make_setup(config, jax.devices()[:1])
    held = {name: setup.resident_weights(name) for name in ("rollout", "grade", "logprob", "update")}
    assert {name for name, weights in held.items() if weights} == groups
    assert all(weights == (setup.learnt,) for weights in held.values() if weights)


def test_slices_lie_along_the_axis_slice(stand_in, planned, monkeypatch):
    stand_in(1.0)
    meshes, of = [], planning.Setup.of
    monkeypatch.setattr(
        planning.Setup, "of", lambda config, *rest: meshes.append(config.mesh) or of(config, *rest)
    )
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    make_plan(recipe, Topology("v5e", (1,), slices=2), MEANS)
    make_plan(recipe, Topology("v5e", (1,)), MEANS)
    assert [mesh.slice for mesh in meshes] == [2, 1]
    with pytest.raises(InputError, match=r"must be a multiple of mesh slice x .* = 16, not 4;"):
        make_plan(recipe, Topology("v5e", (1,), slices=16), MEANS)


def test_between_slices_the_network_is_slower(stand_in, planned):
    """4 GB over links of 200 GB/s, and 1 GB of them over a chip's 25 Gbit/s of the network."""
    stand_in(1.0)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    plan = make_plan(recipe, Topology("v5e", (1,), slices=2), MEANS)
    assert [p.predicted_s for p in plan.phases] == pytest.approx([4 / 200 + 1 / 3.125] * 4)
    assert "1 over the network" in shown(plan)


@pytest.mark.parametrize("named", [True, False])
def test_the_samplers_memory_runs_fewer_rows(stand_in, planned, monkeypatch, named):
    """As `rollout.memory_gb` and `grading.memory_gb` have it, or else what weights and moments leave."""
    stand_in(0.0)
    recipe, gb = planned("mesh.fsdp=1", "mesh.tensor=1"), 0.02
    if named:
        recipe = dataclasses.replace(recipe, grading=dataclasses.replace(recipe.grading, memory_gb=gb))
    else:
        # In float32: what is learnt, both moments, the reference, and weights as decoding takes them.
        held = 5 * 4 * counts.parameters(model_config(recipe.model))
        hbm = int((held + gb * 1e9) / 0.9)
        monkeypatch.setitem(chips.CHIPS, "v5e", dataclasses.replace(chips.CHIPS["v5e"], hbm=hbm))
    phases = make_plan(recipe, Topology("v5e", (1,)), MEANS).to_dict()["phases"]
    rows = int(phases["grade/decode"]["sizes"].split(" x ")[0])
    assert 1 <= rows < 32
    # Slots are for the mean number of branches, between the 4 that are assumed and the 8 at most.
    fewest, most = (((math.ceil(32 * 4 / (rows * n)) - 1) * 10 + 20) / 20 for n in (8, 4))
    assert 1 < fewest <= phases["grade/decode"]["runs"] <= most


def test_memory_for_not_even_a_row_is_refused(planned):
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "grading.memory_gb=1e-6")
    with pytest.raises(InputError, match="memory_gb: one row of"):
        make_plan(recipe, Topology("cpu", (1,)), MEANS)


def test_a_teacher_leaves_no_grading(stand_in, planned):
    stand_in(1.0)
    teacher = "teacher={base_url: 'http://127.0.0.1:1', model: m, cache: c.sqlite}"
    alone = "mesh.fsdp=1", "mesh.tensor=1", teacher, "grader=teacher"
    plan = make_plan(planned(*alone, "data.eval=null"), Topology("v5e", (1,)), MEANS)
    assert not any(p.name.startswith("grade/") for p in plan.phases)
    plan = make_plan(planned(*alone, "data.eval=rows.jsonl"), Topology("v5e", (1,)), MEANS)
    assert [p.runs for p in plan.phases if p.name.startswith("grade/")] == [0], "held-out rows alone"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_holds_what_training_holds(planned, make_setup, rank):
    """Shapes and types of weights, adapters and optimizer, and the network that they are of."""
    config = planned("mesh.fsdp=1", "mesh.tensor=1", f"lora.rank={rank}", "kl_coef=0.1")
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        learner = Learner(build_model(config), config, setup.mesh, longest_prompt=32)
        beside, state = learner.frozen, learner.init_state()
        everything = learner.policy(state.params)

    def facts(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert facts((setup.learnt, setup.opt_state)) == facts(tuple(state))
    assert facts(setup.params) == facts(everything) == facts(beside)
    assert bytes_here(setup.resident_weights("update")) == sum(
        x.nbytes for x in jax.tree.leaves(state.params)
    )


def test_adapters_alone_are_updated(stand_in, planned, make_setup):
    """Base weights go in and do not come out; of products with them the backward pass has one less."""
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "lora.rank=4")
    setup = make_setup(recipe, jax.devices()[:1])

    def shapes(tree):
        return jax.tree.map(lambda x: x.shape, tree)

    with jax.set_mesh(setup.mesh):
        program, _ = setup.programs("update")["update"]
        params, opt_state, _ = program.function.eval_shape(*program.args)
    assert shapes((params, opt_state)) == shapes((setup.learnt, setup.opt_state))
    assert program.args[-1] is setup.base and bytes_here(setup.opt_state) < bytes_here(setup.base) / 2

    stand_in(1.0)
    lora, full = (
        make_plan(planned("mesh.fsdp=1", "mesh.tensor=1", *rank), Topology("v5e", (1,)), MEANS)
        for rank in (["lora.rank=4"], [])
    )
    assert 0.6 < lora.phases[-1].flops / full.phases[-1].flops < 0.75


def test_gpus_ask_for_their_compiler(planned, monkeypatch):
    monkeypatch.setattr(Topology, "compiles", False)
    with pytest.raises(InputError, match=r"needs JAX's CUDA plugin: pip install 'srrl-jax\[plan-gpu\]'"):
        make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("h100", (1, 1)), MEANS)


@pytest.mark.slow
def test_the_command_on_virtual_devices(planned, tmp_path):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(planned("mesh.data=2").to_dict()))
    command = [
        sys.executable,
        "-m",
        "srrl_jax",
        "plan",
        str(path),
        "--topology",
        "cpu:8",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["devices"] == 8
    assert all(phase["peak_hbm_bytes"] > 0 for phase in plan["phases"].values())


def test_a_topology_that_is_not_one_ends_the_command():
    result = CliRunner().invoke(app, ["plan", "configs/demo.yaml", "--topology", "v5p"])
    assert isinstance(result.exception, InputError)
