"""The plan of a recipe: memory and time of its phases, of a step and of the whole run."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from srrl_jax.checkpoints.loading import read_config
from srrl_jax.kernels.attention import BLOCK
from srrl_jax.models import Qwen3Config, counts
from srrl_jax.models.counts import Tree, Work
from srrl_jax.models.presets import PRESETS
from srrl_jax.parallel import computing
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.programs import Compiled, Compiler, DoesNotFit, Setup
from srrl_jax.sampling import RowLengths
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.shapes import RunLengths


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know: means, lengths in tokens.

    Attributes:
      completion, verdict: tokens of a completion, and of a reply of the grader.
      criteria: of a response.
      tries: replies that a criterion takes.
      longest_prompt, longest_criterion, most_criteria: of all rows; those of HealthBench, rounded up.
    """

    completion: float
    verdict: float
    criteria: float = 12.0
    tries: float = 1.0
    longest_prompt: int = 4096
    longest_criterion: int = 256
    most_criteria: int = 48

    def lengths(self, config: TrainConfig, positions: int) -> RunLengths:
        """Of a usual and of the longest row, of which a model of few positions takes less."""
        r, g = config.rollout, config.grading
        longest_criterion, instructions = (
            min(self.longest_criterion, positions // 4),
            min(256, positions // 8),
        )
        room = positions - r.max_new_tokens - g.max_new_tokens - longest_criterion - instructions
        longest = min(r.max_prompt_tokens or self.longest_prompt, max(room, 1))
        prompts = [max(1, longest // 8), longest]
        criterion = longest_criterion // 4
        asked = [[criterion] * math.ceil(self.criteria), [criterion] * (self.most_criteria - 1)]
        asked[1].append(longest_criterion)
        if g.together:
            asked = [[sum(criteria)] for criteria in asked]
        votes = g.votes if g.verdict == "generate" else 1
        return RunLengths(
            [RowLengths(prompt, [0] * config.group_size) for prompt in prompts],
            [
                RowLengths(instructions + prompt, criteria * votes)
                for prompt, criteria in zip(prompts, asked, strict=True)
            ],
            () if g.template == "healthbench" else (0,) * instructions,  # it puts its instructions last
        )


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
    refusal: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of a recipe on a topology."""

    topology: Topology
    assumptions: Assumptions
    phases: list[Phase]
    steps: int

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
    on_start: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Compiles what training would run, and puts figures to it.

    Raises:
      InputError: the mesh does not go with the topology or the model, not one row fits the samplers' memory,
        or the compiler is missing.
    """
    if topology.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=topology.slices))
    sizes = model_config(config.model)
    lengths = assumptions.lengths(config, sizes.max_position_embeddings)
    setup = Setup.of(config, sizes, topology.devices(), lengths, topology.chip.hbm)
    phases = []
    with computing(setup.mesh, config.dtype, config.matmul_precision):
        for group in _groups(config):
            compiler = Compiler(group, topology.ici_group_size, on_start)
            _compile(compiler, setup)
            phases += [_phase(compiled, setup, topology, assumptions) for compiled in compiler.found]
    return Plan(topology, assumptions, phases, config.steps)


def _groups(config: TrainConfig) -> list[str]:
    """The programs of a step by what they are for."""
    graded = config.judge in ("policy", "frozen") or config.data.eval is not None
    scored = config.kl_coef > 0 or config.loss.importance_cap is not None
    return ["rollout", *["grade"] * graded, *["logprob"] * scored, "update"]


def _compile(compiler: Compiler, setup: Setup) -> None:
    try:
        for program, held in setup.programs(compiler.group).values():
            compiler(program, held)
    except DoesNotFit:
        pass  # what was found says so


def _tree(group: str, program: str, setup: Setup) -> Tree:
    """The largest batch of a program."""
    c = setup.config
    if group in ("logprob", "update"):
        return Tree(setup.shapes.microbatch, setup.shapes.prompt, c.group_size, setup.shapes.completions[-1])
    sampler = setup.sampler(group)
    shapes = sampler.shapes
    if program in ("prefill", "score"):
        return Tree(sampler.shards * max(1, shapes.pack // shapes.row), shapes.row, 0, 0)
    if program == "shared prefix":
        return Tree(1, len(sampler.shared), 0, 0)
    return Tree(shapes.running, shapes.row, shapes.fan_out, shapes.own)


def _phase(compiled: Compiled, setup: Setup, topology: Topology, assumptions: Assumptions) -> Phase:
    group, program = compiled.name.split("/")
    tree = _tree(group, program, setup)
    work = _work(group, program, tree, setup)
    shared = setup.mesh.shape["tensor"] * setup.mesh.shape["expert"]
    flops, traffic = work.flops / topology.size, work.traffic / topology.size + work.weights / shared
    chip = topology.chip
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
        case "relayout":
            return Work(0, 4 * counts.parameters(c), counts.parameters(c) * width)
        case "empty caches":
            return Work(0, caches, 0)
        case "shared prefix" | "prefill":
            return counts.forward(c, tree, width, causal)
        case "score":
            return counts.forward(c, tree, width, causal) + counts.head(c, tree.n * tree.b, width)
        case "decode":
            return counts.decode_step(c, tree, width).times(setup.sampler(group).chunk)
        case "log-probabilities":
            layers = counts.forward(c, tree, width, causal).times(setup.microbatches)
            return layers + counts.head(c, positions, width)._replace(traffic=0)
        case "update":
            once = counts.update(c, tree, width, causal, setup.shapes.remat, bool(config.lora.rank))
            learnt = sum(x.size for x in jax.tree.leaves(setup.learnt))
            return once.times(setup.microbatches) + counts.adamw(learnt)
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
    sampler, rollout = setup.sampler(group), group == "rollout"
    shapes, rows = sampler.shapes, c.prompts_per_step * (1 if rollout else c.group_size)
    size, mean = 1.0, a.completion
    if not rollout:  # most responses have the mean number of criteria
        g = c.grading
        votes = g.votes if g.verdict == "generate" else 1
        size = 1.0 if g.together else min(1.0, math.ceil(a.criteria) * votes / shapes.fan_out)
        rows, mean = math.ceil(rows * a.tries), a.verdict
    match program:
        case "relayout":  # the policy moves once for both
            alike = (c.rollout.int8 == "none") == (c.grading.int8 == "none")
            return 0 if not rollout and c.grader == "policy" and alike else 1
        case "empty caches" | "shared prefix":
            return 1
        case "prefill" | "score":
            return math.ceil(rows * size * shapes.row / (sampler.shards * shapes.pack))
    # Slots fill again as branches end; only the last ones run to the limit while others stay empty.
    waves = math.ceil(rows * size * shapes.fan_out / shapes.slots)
    return ((waves - 1) * mean + sampler.new_tokens) / sampler.chunk
