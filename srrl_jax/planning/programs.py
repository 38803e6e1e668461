"""The programs that training runs, compiled for devices that need not be there."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.parallel import make_mesh, platform, shardings
from srrl_jax.planning.collectives import bytes_by_kind, bytes_outside, collectives, largest_array
from srrl_jax.programs import Program, peak_bytes, placed
from srrl_jax.sampling import Sampler
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import samplers
from srrl_jax.training.learner import build_model, minibatch_shapes, update_programs
from srrl_jax.training.shapes import RunLengths, UpdateShapes, plan_update
from srrl_jax.training.update import NOTHING, TrainState, make_optimizer, make_update


class Compiled(NamedTuple):
    """What the compiler says of one program, on each device.

    Attributes:
      peak_bytes: most memory in use while it runs; None where the compiler refused it.
      held_bytes: of that, what lies there beside its arguments, results and temporaries.
      collective_bytes: sent in one run, by kind.
      network_bytes: of them, what leaves the slice or the node.
      largest: the largest array, as "bf16[1024,512]"; by formula the largest part.
      refusal: the compiler's words where the program does not fit.
    """

    name: str
    peak_bytes: int | None
    held_bytes: int
    collective_bytes: dict[str, float]
    network_bytes: float
    largest: str
    seconds: float
    refusal: str = ""


class DoesNotFit(Exception):
    """The compiler refuses a program for lack of memory."""


class Setup(NamedTuple):
    """What the loop holds before its first step, in shapes and placements alone.

    Attributes:
      learnt, base: the weights that updates change (with LoRA the adapters), and those beside them.
      shapes: of updates.
    """

    config: TrainConfig
    mesh: jax.sharding.Mesh
    model: Qwen3
    learnt: Any
    base: Any
    opt_state: Any
    rollout: Sampler
    grading: Sampler
    shapes: UpdateShapes

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        model_config: Qwen3Config,
        devices: list,
        lengths: RunLengths,
        memory: int | None = None,
    ) -> "Setup":
        """Of a recipe on `devices`.

        Args:
          lengths: of the rows to come.
          memory: bytes of a device.
        Raises:
          InputError: mesh, microbatch, attention or adapters do not go with them or the model, or not one
            row fits the samplers' memory.
        """
        mesh = make_mesh(config.mesh, devices)
        whole = NamedSharding(mesh, P())
        with jax.set_mesh(mesh):
            model = build_model(config, model_config)
            shapes = plan_update(config, model, lengths.longest_prompt, mesh, memory)
            rollout, grading = samplers(
                model, config, mesh, lengths, stop_ids=(0, 1), allowed=model_config.vocab_size, memory=memory
            )
        _, adapters, weights = nnx.split(model, nnx.LoRAParam, ...)
        state, base = (adapters, weights) if config.lora.rank else (weights, NOTHING)
        optimizer = make_optimizer(config.optimizer)
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), base)
        learnt, base = (placed(part, shardings(part, mesh)) for part in (state, base))
        opt_state = optax.tree_utils.tree_map_params(
            optimizer,
            lambda x, p: _shaped(x, p.sharding),
            jax.eval_shape(optimizer.init, state),
            learnt,
            transform_non_params=lambda x: _shaped(x, whole),
        )
        return cls(config, mesh, model, learnt, base, opt_state, rollout, grading, shapes)

    @property
    def start(self) -> Any:
        """What is learnt, as it was, in the type of the computation; with LoRA the adapters as they are."""
        dtype = jnp.float32 if self.config.lora.rank else self.model.dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self.learnt)

    @property
    def params(self) -> Any:
        """All weights of the policy in the type of the computation."""
        return nnx.merge_state(self.start, self.base)

    def resident_weights(self, group: str) -> tuple:
        """Copies of the weights that stay in device memory and are no arguments of the group's programs.

        These are the trained weights where the programs take them in another dtype, and the frozen ones
        unless they are in host memory.
        """
        c = self.config
        cast = c.lora.rank == 0 and self.model.dtype != jnp.float32
        brought = {"grade": c.frozen_grades, "logprob": c.kl_coef > 0}.get(group, False)
        frozen = c.needs_frozen and (c.reference == "device" or brought)
        return (self.learnt,) * (cast and group != "update") + (self.start,) * frozen

    def sampler(self, group: str) -> Sampler:
        """Of "rollout" or "grade"."""
        return self.rollout if group == "rollout" else self.grading

    @property
    def moments(self) -> tuple:
        """The optimizer's, where the devices hold them between updates."""
        return (self.opt_state,) if self.config.optimizer.moments == "device" else ()

    @property
    def microbatches(self) -> int:
        """Of a minibatch."""
        o = self.config.optimizer
        return self.config.prompts_per_step // (o.minibatches * self.shapes.microbatch)

    def programs(self, group: str) -> dict[str, tuple[Program, tuple]]:
        """The largest program of each kind of "rollout", "grade", "logprob" or "update", and what lies on the
        devices beside its arguments. Under `jax.set_mesh` of the mesh."""
        if group in ("rollout", "grade"):
            sampler = self.sampler(group)
            scores = group == "grade" and self.config.grading.verdict != "generate"
            weights = {"params": self.params, "decoding": sampler.decoding}
            rest = (*self.moments, *self.resident_weights(group))
            if group == "grade" and sampler.int8_weights != self.rollout.int8_weights:
                rest = (*rest, self.rollout.decoding)  # of other types, so the grader's lie beside them
            first = {"decode": "decoding", "empty caches": ""}

            def held(program: Program) -> tuple:
                taken = {first.get(program.kind, "params")}
                taken |= {"decoding"} if program.kind == "relayout" or scores else set()
                return (*(part for name, part in weights.items() if name not in taken), *rest)

            found = list(sampler.programs(self.params, scores))
            if group == "grade" and sampler.int8_weights == self.rollout.int8_weights:
                found = [program for program in found if program.kind != "relayout"]  # done for rollouts
            return {program.kind: (program, held(program)) for program in found}
        graphdef, optimizer = nnx.graphdef(self.model), make_optimizer(self.config.optimizer)
        update = make_update(graphdef, self.config, optimizer, self.shapes.remat)
        minibatches = minibatch_shapes(self.config, self.shapes, self.mesh)
        state = TrainState(self.learnt, self.opt_state)
        found = update_programs(graphdef, update, self.config, minibatches, state, self.base, self.params)
        kind = "update" if group == "update" else "log-probabilities"
        held = (
            self.resident_weights(group)
            if group == "update"
            else (*self.moments, *self.resident_weights(group))
        )
        return {program.kind: (program, held) for program in found if program.kind == kind}


class Compiler:
    """Compiles instead of running: shapes in, shapes out, and `found` says what the compiler made of it.

    Under `jax.set_mesh` of the mesh to compile for. For a TPU with little effort, which is quick and whose
    memory differs little from that of full effort.

    Args:
      group: what the programs are for; the first part of their names.
      ici_group_size: devices in a row that links join (`Topology.ici_group_size`); all of them by default.
      on_start: told the name of a program before it is compiled.

    Attribute `texts`: of the compiled programs, by name.
    """

    def __init__(
        self,
        group: str,
        ici_group_size: int = sys.maxsize,
        on_start: Callable[[str], None] = lambda name: None,
    ):
        self.group, self.ici_group_size, self.on_start = group, ici_group_size, on_start
        self.texts: dict[str, str] = {}
        self.found: list[Compiled] = []

    def __call__(self, program: Program, held: Any = ()) -> Any:
        """Shapes of the results of a program, placed as the compiler places them.

        Args:
          held: what lies on the devices beside its arguments.

        Raises:
          DoesNotFit: for lack of memory; `found` holds the refusal.
          InputError: a library of the compiler is missing.
        """
        name = f"{self.group}/{program.kind}"
        self.on_start(name)
        start = time.perf_counter()
        try:
            lowered = program.lower()
        except RuntimeError as error:
            if "cuDNN not found" not in str(error):
                raise
            raise InputError(
                "srrl plan for a GPU needs cuDNN for this attention: pip install 'srrl-jax[plan-gpu]', or "
                "set attention=xla"
            ) from None
        size = bytes_here(held)
        try:
            compiled = lowered.compile(compiler_options=_options())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = time.perf_counter() - start
            refusal = str(error)
            self.found.append(Compiled(name, None, size, {}, 0.0, _refused_array(refusal), seconds, refusal))
            raise DoesNotFit(name) from None
        text = compiled.as_text()
        self.texts[name], sent = text, collectives(text)
        self.found.append(
            Compiled(
                name,
                peak_bytes(compiled.memory_analysis()) + size,
                size,
                bytes_by_kind(sent),
                bytes_outside(sent, self.ici_group_size),
                largest_array(text),
                time.perf_counter() - start,
            )
        )
        return jax.tree.map(_shaped, lowered.out_info, compiled.output_shardings)


def bytes_here(tree: Any) -> int:
    """Of a tree of shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


def _shaped(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _options() -> dict[str, Any]:
    if platform() != "tpu":
        return {}
    old = jax.__version__.startswith("0.10.")
    return {"exec_time_optimization_effort": -1.0} if old else {"optimization_level": "O0"}


def _refused_array(message: str) -> str:
    """The largest array that a refusal lists."""
    return largest_array(message.replace("Shape:", " = "))
