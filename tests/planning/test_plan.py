import dataclasses
import json
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
from srrl_jax.planning import programs
from srrl_jax.planning.cache import Cache
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import Assumptions, make_plan, model_config
from srrl_jax.planning.programs import Compiled, Setup, bytes_here
from srrl_jax.planning.table import render
from srrl_jax.sampling.memory import needed
from srrl_jax.training import TrainConfig
from srrl_jax.training.learner import Learner, network

MEANS = Assumptions(completion=32, verdict=10)


@pytest.fixture
def stand_in(monkeypatch):
    """Compiles nothing: each program is said to take this many GiB (None: refused). Counts its calls."""
    calls = []

    def use(gib: float | None):
        def compiled(compiler, group, setup):
            name = compiler.group
            calls.append(name)
            program = {"rollout": "decode", "grade": "decode", "logprob": "completion_logprobs"}.get(
                name, name
            )
            peak = None if gib is None else int(gib * GIB)
            refusal = "RESOURCE_EXHAUSTED: out of memory" if gib is None else ""
            sent = {"all-gather": 4e9}
            outside = 1e9 if compiler.island < setup.mesh.size else 0.0
            return [Compiled(f"{name}/{program}", peak, 0, sent, outside, "bf16[7,9]", 1.0, refusal)]

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
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS, Cache(None))
    assert plan.fits and plan.free == pytest.approx(1 - 1 / 15.75)
    phases = plan.to_dict()["phases"]
    assert list(phases) == ["rollout/decode", "grade/decode", "logprob/completion_logprobs", "update/update"]
    keys = {"fits", "peak_hbm_bytes", "hbm_bytes", "flops", "collective_bytes", "predicted_s"}
    assert all(keys <= phase.keys() for phase in phases.values())
    # A chunk is 32 tokens: the one wave of 8 prompts runs to its limit of 64; 32 responses are 4 waves, of
    # which all but the last take the mean of 10 tokens, and the limit is 20 (one chunk).
    assert phases["rollout/decode"]["runs"] == 2
    assert phases["grade/decode"]["runs"] == (3 * 10 + 20) / 20
    assert phases["update/update"]["runs"] == 1
    total = sum(phase["runs"] * phase["predicted_s"] for phase in phases.values())
    assert plan.to_dict()["step"]["predicted_s"] == pytest.approx(total)
    assert plan.to_dict()["run"]["hours"] == pytest.approx(total * 60 / 3600)


def test_time_is_that_of_the_slowest_part(stand_in, planned):
    """4 GB to send take 20 ms on links of 200 GB/s, longer than the tiny model computes."""
    stand_in(1.0)
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS, Cache(None))
    assert [p.predicted_s for p in plan.phases] == pytest.approx([4e9 / 200e9] * 4)


@pytest.mark.parametrize(("gib", "words"), [(16.0, "needs 16.00 GiB"), (None, "RESOURCE_EXHAUSTED")])
def test_a_plan_that_does_not_fit_says_what_would_help(stand_in, planned, gib, words):
    stand_in(gib)
    plan = make_plan(planned("mesh.fsdp=1", "mesh.tensor=1"), Topology("v5e", (1,)), MEANS, Cache(None))
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
def test_the_reference_counts_while_it_is_on_the_devices(planned, overrides, groups):
    config = planned("mesh.fsdp=1", "mesh.tensor=1", *overrides)
    setup = Setup.of(config, model_config(config.model), jax.devices()[:1])
    held = {name: setup.beside(name) for name in ("rollout", "grade", "logprob", "update")}
    assert {name for name, weights in held.items() if weights} == groups
    assert all(weights == (setup.learnt,) for weights in held.values() if weights)


def test_a_program_is_compiled_once(stand_in, planned, tmp_path):
    calls, topology = stand_in, Topology("v5e", (1,))
    calls(1.0)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    one = make_plan(recipe, topology, MEANS, Cache(tmp_path))
    calls(2.0)
    again = make_plan(dataclasses.replace(recipe, steps=7, run_dir="other"), topology, MEANS, Cache(tmp_path))
    assert [p.peak_hbm_bytes for p in again.phases] == [p.peak_hbm_bytes for p in one.phases]
    other = make_plan(dataclasses.replace(recipe, dtype="bfloat16"), topology, MEANS, Cache(tmp_path))
    assert other.tightest.peak_hbm_bytes == 2 * GIB


def test_slices_lie_along_the_axis_slice(stand_in, planned, monkeypatch):
    stand_in(1.0)
    meshes, of = [], planning.Setup.of
    monkeypatch.setattr(
        planning.Setup, "of", lambda config, *rest: meshes.append(config.mesh) or of(config, *rest)
    )
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    make_plan(recipe, Topology("v5e", (1,), slices=2), MEANS, Cache(None))
    make_plan(recipe, Topology("v5e", (1,)), MEANS, Cache(None))
    assert [mesh.slice for mesh in meshes] == [2, 1]
    with pytest.raises(InputError, match=r"must be a multiple of mesh slice x .* = 16, not 4;"):
        make_plan(recipe, Topology("v5e", (1,), slices=16), MEANS, Cache(None))


def test_between_slices_the_network_is_slower(stand_in, planned):
    """4 GB over links of 200 GB/s, and 1 GB of them over a chip's 25 Gbit/s of the network."""
    stand_in(1.0)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    plan = make_plan(recipe, Topology("v5e", (1,), slices=2), MEANS, Cache(None))
    assert [p.predicted_s for p in plan.phases] == pytest.approx([4 / 200 + 1 / 3.125] * 4)
    assert "1 over the network" in shown(plan)


def budget_for(config: TrainConfig, rows: float) -> float:
    """GB that this many of the longest rows to be graded take."""
    c, g = model_config(config.model), config.grading
    sizes = g.prefix_buckets[-1], g.criteria_buckets[-1], g.criterion_buckets[-1], g.max_new_tokens
    return rows * needed(c, config.dtype, 1, *sizes) / 1e9


@pytest.mark.parametrize("named", [True, False])
def test_the_samplers_memory_makes_waves_smaller(stand_in, planned, monkeypatch, named):
    """As `rollout.memory_gb` and `grading.memory_gb` have it, or else half of the chip's HBM."""
    stand_in(0.0)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    gb = budget_for(recipe, 3.5)
    if named:
        recipe = dataclasses.replace(recipe, grading=dataclasses.replace(recipe.grading, memory_gb=gb))
    else:
        chip = dataclasses.replace(chips.CHIPS["v5e"], hbm=int(2 * gb * 1e9))
        monkeypatch.setitem(chips.CHIPS, "v5e", chip)
    plan = make_plan(recipe, Topology("v5e", (1,)), MEANS, Cache(None))
    assert "grading.rows: 3 of the longest run at a time, not 8, for grading.memory_gb is" in shown(plan)
    phases = plan.to_dict()["phases"]
    assert phases["grade/decode"]["sizes"].startswith("3 x ")
    assert phases["grade/decode"]["runs"] == (10 * 10 + 20) / 20, "32 responses are 11 waves"


def test_memory_for_not_even_a_row_does_not_fit(stand_in, planned):
    stand_in(1.0)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "grading.memory_gb=1e-6")
    plan = make_plan(recipe, Topology("v5e", (1,)), MEANS, Cache(None))
    assert not plan.fits and plan.free is None and plan.tightest.name == "grade/prefill"
    assert "grade/prefill does not fit: memory_gb: one row of" in shown(plan)


def test_a_teacher_leaves_no_grading(stand_in, planned):
    stand_in(1.0)
    teacher = "teacher={base_url: 'http://127.0.0.1:1', model: m, cache: c.sqlite}"
    alone = "mesh.fsdp=1", "mesh.tensor=1", teacher, "grader=teacher"
    plan = make_plan(planned(*alone, "data.eval=null"), Topology("v5e", (1,)), MEANS, Cache(None))
    assert not any(p.name.startswith("grade/") for p in plan.phases)
    plan = make_plan(planned(*alone, "data.eval=rows.jsonl"), Topology("v5e", (1,)), MEANS, Cache(None))
    assert [p.runs for p in plan.phases if p.name.startswith("grade/")] == [0], "held-out rows alone"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_holds_what_training_holds(planned, rank):
    """Shapes and types of weights, adapters and optimizer, and the network that they are of."""
    config = planned("mesh.fsdp=1", "mesh.tensor=1", f"lora.rank={rank}", "kl_coef=0.1")
    setup = Setup.of(config, model_config(config.model), jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        learner = Learner(network(config), config, setup.mesh)
        beside, state = learner.frozen, learner.start()
        everything = learner.policy(state.params)

    def facts(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert facts((setup.learnt, setup.opt_state)) == facts(tuple(state))
    assert facts(setup.params) == facts(everything) == facts(beside)
    assert bytes_here(setup.beside("update")) == sum(x.nbytes for x in jax.tree.leaves(state.params))


def test_adapters_alone_are_updated(stand_in, planned):
    """Base weights go in and do not come out; of products with them the backward pass has one less."""
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "lora.rank=4")
    setup = Setup.of(recipe, model_config(recipe.model), jax.devices()[:1])
    traced = []

    def trace(program, *args, held):
        traced.append((args, program.eval_shape(*args)))

    with jax.set_mesh(setup.mesh):
        programs.update(trace, setup)
    (args, (params, opt_state, _)), shapes = traced[0], lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes((params, opt_state)) == shapes((setup.learnt, setup.opt_state))
    assert args[-1] is setup.base and bytes_here(setup.opt_state) < bytes_here(setup.base) / 2

    stand_in(1.0)
    lora, full = (
        make_plan(planned("mesh.fsdp=1", "mesh.tensor=1", *rank), Topology("v5e", (1,)), MEANS, Cache(None))
        for rank in (["lora.rank=4"], [])
    )
    assert 0.6 < lora.phases[-1].flops / full.phases[-1].flops < 0.75


def test_gpus_are_planned_by_formula(planned, monkeypatch):
    """Where JAX's CUDA plugin is not installed."""
    monkeypatch.setattr(Topology, "compiles", False)
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices() * self.size)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    plan = make_plan(recipe, Topology("h100", (1, 1)), MEANS, Cache(None))
    assert plan.fits and not any(p.compiled for p in plan.phases)
    # Two nodes hold all weights each: what an update's microbatches sum of gradients passes the network.
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "mesh.data=2")
    update = make_plan(recipe, Topology("h100", (2, 1)), MEANS, Cache(None)).phases[-1]
    weights = 4 * counts.parameters(model_config(recipe.model))
    assert update.network_bytes == update.collective_bytes["all-reduce"]
    assert update.network_bytes == pytest.approx(2 * weights, rel=0.01), (
        "half of it both ways, for 2 microbatches"
    )
    assert "nothing was compiled" in shown(plan)
    monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.CHIPS["h100"], hbm=2**20))
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1", "rollout.memory_gb=1", "grading.memory_gb=1")
    plan = make_plan(recipe, Topology("h100", (1, 1)), MEANS, Cache(None))
    assert "update/update does not fit: needs 0.0" in shown(plan) and "largest part" in shown(plan)


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
        "--no-cache",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["devices"] == 8
    assert all(phase["compiled"] and phase["peak_hbm_bytes"] > 0 for phase in plan["phases"].values())


def test_a_topology_that_is_not_one_ends_the_command():
    result = CliRunner().invoke(app, ["plan", "configs/demo.yaml", "--topology", "v5p"])
    assert isinstance(result.exception, InputError)
