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
from srrl_jax.parallel.chips import GIB
from srrl_jax.planning import plan as planning
from srrl_jax.planning.cache import Cache
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.plan import Assumptions, make_plan, model_config
from srrl_jax.planning.programs import Compiled, Setup
from srrl_jax.planning.table import render

MEANS = Assumptions(completion=32, verdict=10)


@pytest.fixture
def stand_in(monkeypatch):
    """Compiles nothing: each program is said to take this many GiB (None: refused). Counts its calls."""
    calls = []

    def use(gib: float | None):
        def compiled(name, group, setup, on_start):
            calls.append(name)
            program = {"rollout": "decode", "grade": "decode", "logprob": "completion_logprobs"}.get(
                name, name
            )
            peak = None if gib is None else int(gib * GIB)
            refusal = "RESOURCE_EXHAUSTED: out of memory" if gib is None else ""
            return [Compiled(f"{name}/{program}", peak, 0, {"all-gather": 4e9}, "bf16[7,9]", 1.0, refusal)]

        monkeypatch.setattr(planning, "_compile", compiled)
        monkeypatch.setattr(Topology, "devices", lambda self: jax.devices() * self.size)
        return calls

    return use


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
    console = Console(record=True, width=300)
    console.print(render(plan))
    text = console.export_text()
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
    assert all(weights == (setup.params,) for weights in held.values() if weights)


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


def test_gpus_are_planned_by_formula(planned, monkeypatch):
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices() * self.size)
    recipe = planned("mesh.fsdp=1", "mesh.tensor=1")
    plan = make_plan(recipe, Topology("h100", (1, 1)), MEANS, Cache(None))
    assert plan.fits and not any(p.compiled for p in plan.phases)
    console = Console(record=True, width=200)
    console.print(render(plan))
    assert "nothing was compiled" in console.export_text()


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
