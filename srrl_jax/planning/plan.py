"""The plan of a recipe: memory and time of its phases, of a step and of the whole run."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from srrl_jax.grading import Grader
from srrl_jax.models import Qwen3Config, counts
from srrl_jax.models.attention import BLOCK
from srrl_jax.models.counts import Tree, Work
from srrl_jax.models.presets import PRESETS
from srrl_jax.models.weights import read_config
from srrl_jax.parallel import computing
from srrl_jax.planning import programs
from srrl_jax.planning.cache import Cache
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.formula import estimate
from srrl_jax.planning.programs import Compiled, Compiler, DoesNotFit, Setup
from srrl_jax.sampling.buckets import fit
from srrl_jax.sampling.memory import default_budget
from srrl_jax.training.config import TrainConfig

SAMPLERS = {"rollout": "rollout", "grade": "grading"}  # groups of programs that sample, and their key


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know: means, lengths in tokens.

    Attributes:
      completion, verdict: tokens of a completion, and of a reply of the grader.
      criteria: of a response.
      tries: replies that a criterion takes.
    """

    completion: float
    verdict: float
    criteria: float = 12.0
    tries: float = 1.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program on its largest shapes; figures are of one device and one run of the program.

    Attributes:
      name: group/program.
      sizes: rows x (prefix + branches x own tokens).
      peak_hbm_bytes: most memory in use while it runs, with what else lies on the device; None where the
        compiler refused it.
      hbm_bytes: what the device has for programs.
      flops, traffic_bytes: of the cores and of the HBM, by formula (`counts`).
      collective_bytes: sent, by kind.
      network_bytes: of them, what leaves the slice, or the node of GPUs.
      predicted_s: the slowest of cores, HBM and links at their published peaks.
      runs: of it in a step, as assumed; not whole where most runs are on smaller shapes.
      compiled: false where memory and collectives are by formula too.
      refusal: the compiler's words.
    """

    name: str
    sizes: str
    fits: bool
    peak_hbm_bytes: int | None
    hbm_bytes: int
    flops: float
    traffic_bytes: float
    collective_bytes: dict[str, float]
    network_bytes: float
    predicted_s: float
    runs: float
    largest_array: str
    compile_s: float
    compiled: bool
    refusal: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of a recipe on a topology; `notes` say where it is not as the recipe has it."""

    topology: Topology
    assumptions: Assumptions
    phases: list[Phase]
    steps: int
    notes: list[str]

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)

    @property
    def tightest(self) -> Phase:
        """That with least memory left, a refused one first."""
        return max(self.phases, key=lambda p: math.inf if p.peak_hbm_bytes is None else p.peak_hbm_bytes)

    @property
    def free(self) -> float | None:
        """Share of the HBM that the tightest phase leaves."""
        peak = self.tightest.peak_hbm_bytes
        return None if peak is None else 1 - peak / self.tightest.hbm_bytes

    @property
    def step_s(self) -> float:
        return sum(phase.predicted_s * phase.runs for phase in self.phases)

    @property
    def run_hours(self) -> float:
        return self.step_s * self.steps / 3600

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        hours = self.run_hours
        return {
            "topology": str(self.topology),
            "devices": self.topology.size,
            "fits": self.fits,
            "free_hbm": self.free,
            "notes": self.notes,
            "assumptions": dataclasses.asdict(self.assumptions),
            "phases": {p.name: {k: v for k, v in vars(p).items() if k != "name"} for p in self.phases},
            "step": {"predicted_s": self.step_s},
            "run": {"steps": self.steps, "hours": hours, "chip_hours": hours * self.topology.chips},
        }


def model_config(source: str) -> Qwen3Config:
    """Of a published size by its name, without a download; else of the checkpoint."""
    name = source.rsplit("/", 1)[-1].lower()
    return PRESETS[name] if name in PRESETS else read_config(source)


def make_plan(
    config: TrainConfig,
    topology: Topology,
    assumptions: Assumptions,
    cache: Cache,
    on_start: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Compiles what training would run, where there is a compiler for it, and puts figures to it.

    Raises:
      InputError: mesh or buckets do not go with the topology or the model, or its compiler is missing.
    """
    config = _on_the_chip(config, topology)
    if topology.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=topology.slices))
    setup = Setup.of(config, model_config(config.model), topology.devices())
    if not topology.compiles:
        setup.rollout.has_scores = setup.grading.has_scores = False  # the formula is of fused attention
    phases = []
    with computing(setup.mesh, config.dtype, config.matmul_precision):
        for name, group in _groups(config).items():
            trees = _trees(name, setup)
            refusal = setup.table(name)[1] if name in SAMPLERS else ""
            if refusal:
                found = [Compiled(f"{name}/prefill", None, 0, {}, 0.0, "", 0.0, refusal)]
            elif topology.compiles:
                compiler = Compiler(name, topology.island, on_start)
                found = cache.get(name, config, topology, partial(_compile, compiler, group, setup))
            else:
                found = estimate(name, setup, trees, topology.island)
            phases += [_phase(compiled, trees, setup, topology, assumptions) for compiled in found]
    return Plan(topology, assumptions, phases, config.steps, _fewer_rows(setup))


def _fewer_rows(setup: Setup) -> list[str]:
    """Where the samplers' memory does not hold as many rows as the recipe says."""
    notes = []
    for name, key in SAMPLERS.items():
        sampler, rows = setup.sampler(name), setup.table(name)[0].rows[-1]
        if rows < sampler.buckets.rows[-1]:
            notes.append(
                f"{key}.rows: {rows} of the longest run at a time, not {sampler.buckets.rows[-1]}, for "
                f"{key}.memory_gb is {sampler.budget / 1e9:.3g}"
            )
    return notes


def _groups(config: TrainConfig) -> dict[str, Callable[[Compiler, Setup], None]]:
    """The programs of a step by what they are for."""
    rows = config.prompts_per_step
    groups = {"rollout": partial(programs.sampling, count=rows)}
    if config.judge in ("teacher", "own") and config.data.eval is None:
        pass  # the devices never grade
    elif config.grading.verdict == "generate":
        groups["grade"] = partial(programs.sampling, count=rows * config.group_size)
    else:
        groups["grade"] = programs.verdicts
    if config.kl_coef > 0 or config.loss.importance_cap is not None:
        groups["logprob"] = programs.logprobs
    return groups | {"update": programs.update}


def _on_the_chip(config: TrainConfig, topology: Topology) -> TrainConfig:
    """The recipe with what training would find out on the chip: the memory that samplers may take."""
    half = default_budget(topology.chip.hbm) / 1e9
    r, g = config.rollout, config.grading
    return dataclasses.replace(
        config,
        attention=config.attention if topology.compiles else "auto",
        rollout=dataclasses.replace(r, memory_gb=r.memory_gb or half),
        grading=dataclasses.replace(g, memory_gb=g.memory_gb or half),
    )


def _compile(compiler: Compiler, group, setup: Setup) -> list[Compiled]:
    try:
        group(compiler, setup)
    except DoesNotFit:
        pass  # what was found says so
    return compiler.found


def _trees(name: str, setup: Setup) -> dict[str, Tree]:
    """The largest batch of each program of a group."""
    c = setup.config
    if name in SAMPLERS:
        sampler, (b, _) = setup.sampler(name), setup.table(name)
        rows, prefix, fan_out = b.rows[-1], b.prefix[-1], b.fan_out[-1]
        given = Tree(rows, prefix, fan_out, b.branch[-1])
        full = Tree(rows, prefix, fan_out, b.branch[-1] + sampler.new_tokens)
        names = dict.fromkeys(("unstack", "prefill", "admit", "next_logprobs"), given)
        return names | dict.fromkeys(("empty", "resize", "decode"), full)
    tree = Tree(c.optimizer.microbatch, c.rollout.prompt_buckets[-1], c.group_size, c.rollout.max_new_tokens)
    return {"completion_logprobs" if name == "logprob" else "update": tree}


def _phase(
    compiled: Compiled, trees: dict[str, Tree], setup: Setup, topology: Topology, assumptions: Assumptions
) -> Phase:
    group, program = compiled.name.split("/")
    work = _work(group, program, trees[program], setup)
    shared = setup.mesh.shape["tensor"] * setup.mesh.shape["expert"]
    flops, traffic = work.flops / topology.size, work.traffic / topology.size + work.weights / shared
    chip, tree = topology.chip, trees[program]
    sent = sum(compiled.collective_bytes.values()) / chip.links + compiled.network_bytes / chip.network
    return Phase(
        name=compiled.name,
        sizes=f"{tree.n} x ({tree.p} + {tree.b} x {tree.l})",
        fits=compiled.peak_bytes is not None and compiled.peak_bytes <= chip.hbm,
        peak_hbm_bytes=compiled.peak_bytes,
        hbm_bytes=chip.hbm,
        flops=flops,
        traffic_bytes=traffic,
        collective_bytes=compiled.collective_bytes,
        network_bytes=compiled.network_bytes,
        predicted_s=max(flops / chip.flops, traffic / chip.bandwidth, sent),
        runs=_runs(group, program, setup, assumptions),
        largest_array=compiled.largest,
        compile_s=compiled.seconds,
        compiled=topology.compiles,
        refusal=compiled.refusal,
    )


def _work(group: str, program: str, tree: Tree, setup: Setup) -> Work:
    """Of all devices, for one run of a program."""
    c, config = setup.model.config, setup.config
    width = setup.model.dtype.itemsize
    # XLA's attention skips what a block of queries cannot see, kernels skip by blocks too.
    causal = max(tree.p, tree.l) > BLOCK
    caches = tree.tokens * counts.cache_bytes(c, width)
    positions = tree.n * tree.b * tree.l * setup.microbatches
    match program:
        case "unstack":
            return Work(0, 4 * counts.parameters(c), counts.parameters(c) * width)
        case "empty":
            return Work(0, caches, 0)
        case "resize" | "admit":
            return Work(0, 2 * caches, 0)
        case "prefill":
            return counts.forward(c, tree, width, causal)
        case "next_logprobs":
            return counts.forward(c, tree, width, causal) + counts.head(c, tree.n * tree.b, width)
        case "decode":
            return counts.decode_step(c, tree, width).times(setup.sampler(group).chunk)
        case "completion_logprobs":
            layers = counts.forward(c, tree, width, causal).times(setup.microbatches)
            return layers + counts.head(c, positions, width)._replace(traffic=0)
        case "update":
            o, frozen = config.optimizer, bool(config.lora.rank)
            passes = counts.update(c, tree, width, causal, o.remat, frozen).times(setup.microbatches)
            return passes + counts.adamw(sum(x.size for x in jax.tree.leaves(setup.learnt)))
    raise ValueError(program)


def _runs(group: str, program: str, setup: Setup, a: Assumptions) -> float:
    """How often a program runs in a step."""
    c = setup.config
    if group == "update":
        return c.optimizer.minibatches
    if group == "grade" and c.judge in ("teacher", "own"):
        return 0  # held-out rows alone are graded here
    if group == "logprob":
        return c.optimizer.minibatches * ((c.kl_coef > 0) + (c.loss.importance_cap is not None))
    sampler, (buckets, _), rollout = setup.sampler(group), setup.table(group), group == "rollout"
    waves = math.ceil(c.prompts_per_step * (1 if rollout else c.group_size) / buckets.rows[-1])
    size, mean = 1.0, a.completion
    if not rollout:  # most responses run in the bucket that the mean number of criteria falls into
        table, g = buckets.fan_out, c.grading
        (branches,) = Grader.fan_out([math.ceil(a.criteria)], g.verdict, g.votes, g.together)
        size = fit(min(branches, table[-1]), table, "--criteria") / table[-1]
        waves, mean = math.ceil(waves * a.tries), a.verdict
    match program:
        case "unstack":  # the policy moves once for both
            alike = (c.rollout.int8 == "none") == (c.grading.int8 == "none")
            return 0 if not rollout and c.grader == "policy" and alike else 1
        case "empty":
            return 1
        case "prefill" | "admit" | "next_logprobs":
            return waves * size
        case "resize":  # widths double
            return math.log2(max(2, sampler.new_tokens / sampler.chunk))
    # Slots fill again as branches end; only the last ones run to the limit while others stay empty.
    return ((waves - 1) * mean + sampler.new_tokens) * size / sampler.chunk
