"""The programs that training runs, compiled for devices that need not be there."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.models.attention import platform
from srrl_jax.parallel import ROLLOUT_RULES, batch_sharding, make_mesh, shardings
from srrl_jax.planning.collectives import bytes_by_kind, bytes_outside, collectives, largest_array
from srrl_jax.sampling import Buckets, Completion, Sampler
from srrl_jax.sampling.buckets import Lengths, Wave
from srrl_jax.sampling.decode import Running, admit, decode, empty, prefill, resize
from srrl_jax.sampling.sampler import Plan, pack, unstack
from srrl_jax.sampling.schedule import Schedule
from srrl_jax.sampling.score import next_logprobs
from srrl_jax.training.batch import UpdateBatch, check_microbatch, pack_groups, split_batch
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import samplers
from srrl_jax.training.learner import network
from srrl_jax.training.update import NOTHING, completion_logprobs, make_optimizer, make_update


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
    """

    config: TrainConfig
    mesh: jax.sharding.Mesh
    model: Qwen3
    learnt: Any
    base: Any
    opt_state: Any
    rollout: Sampler
    grading: Sampler

    @classmethod
    def of(cls, config: TrainConfig, model_config: Qwen3Config, devices: list) -> "Setup":
        """Of a recipe on `devices`.

        Raises:
          InputError: mesh, buckets, microbatch, attention or adapters do not go with them or the model.
        """
        mesh = make_mesh(config.mesh, devices)
        check_microbatch(config, mesh)
        whole = NamedSharding(mesh, P())
        with jax.set_mesh(mesh):
            model = network(config, model_config)
            rollout, grading = samplers(model, config, mesh, stop_ids=(0, 1), allowed=model_config.vocab_size)
        _, adapters, weights = nnx.split(model, nnx.LoRAParam, ...)
        state, base = (adapters, weights) if config.lora.rank else (weights, NOTHING)
        optimizer = make_optimizer(config.optimizer)
        learnt, base = (_placed(part, shardings(part, mesh)) for part in (state, base))
        opt_state = optax.tree_utils.tree_map_params(
            optimizer,
            lambda x, p: _shaped(x, p.sharding),
            jax.eval_shape(optimizer.init, state),
            learnt,
            transform_non_params=lambda x: _shaped(x, whole),
        )
        return cls(config, mesh, model, learnt, base, opt_state, rollout, grading)

    @property
    def graphdef(self) -> nnx.GraphDef:
        return nnx.graphdef(self.model)

    @property
    def params(self) -> Any:
        """All weights of the policy."""
        return nnx.merge_state(self.learnt, self.base)

    def table(self, group: str) -> tuple[Buckets, str]:
        """Buckets of "rollout" or "grade" with those sizes of `rows` that the sampler's memory holds of the
        longest rows; and what it says where it holds not one of them."""
        sampler = self.sampler(group)
        b = sampler.buckets
        try:
            return sampler.plan([[0] * b.prefix[-1]], [[[0] * b.branch[-1]] * b.fan_out[-1]]).buckets, ""
        except InputError as error:
            return dataclasses.replace(b, rows=b.rows[:1]), str(error)

    def beside(self, group: str) -> tuple:
        """What is learnt or its start, whichever a group of programs does not run on: the devices hold it
        beside, except while the start is in host memory."""
        c = self.config
        brought = {"grade": c.frozen_grades, "logprob": c.kl_coef > 0}.get(group, False)
        return (self.learnt,) if c.needs_frozen and (c.reference == "device" or brought) else ()

    @property
    def decoding(self) -> Any:
        """The weights in the layout that rollouts decode with."""
        shapes = self.rollout.decoding
        return _placed(shapes, shardings(shapes, self.mesh, ROLLOUT_RULES))

    def sampler(self, group: str) -> Sampler:
        """Of "rollout" or "grade"."""
        return self.rollout if group == "rollout" else self.grading

    @property
    def microbatches(self) -> int:
        """Of a minibatch."""
        o = self.config.optimizer
        return self.config.prompts_per_step // (o.minibatches * o.microbatch)


class Compiler:
    """Compiles instead of running: shapes in, shapes out, and `found` says what the compiler made of it.

    Under `jax.set_mesh` of the mesh to compile for. For a TPU with little effort, which is quick and whose
    memory differs little from that of full effort.

    Args:
      group: what the programs are for; the first part of their names.
      island: devices in a row that links join (`Topology.island`); all of them by default.
      on_start: told the name of a program before it is compiled.

    Attribute `texts`: of the compiled programs, by name.
    """

    def __init__(
        self, group: str, island: int = sys.maxsize, on_start: Callable[[str], None] = lambda name: None
    ):
        self.group, self.island, self.on_start = group, island, on_start
        self.texts: dict[str, str] = {}
        self.found: list[Compiled] = []

    def __call__(self, program, *args, held: Any = (), **static):
        """Shapes of the results of a jitted function, placed as the compiler places them.

        Args:
          held: what lies on the devices beside its arguments.

        Raises:
          DoesNotFit: for lack of memory; `found` holds the refusal.
          InputError: a library of the compiler is missing.
        """
        name = f"{self.group}/{program.__name__}"
        self.on_start(name)
        start = time.perf_counter()
        try:
            lowered = program.lower(*args, **static)
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
                _peak(compiled.memory_analysis()) + size,
                size,
                bytes_by_kind(sent),
                bytes_outside(sent, self.island),
                largest_array(text),
                time.perf_counter() - start,
            )
        )
        return jax.tree.map(_shaped, lowered.out_info, compiled.output_shardings)


def sampling(compiler: Compiler, setup: Setup, count: int) -> None:
    """What `Sampler.generate` runs for `count` rows of the largest sizes, with the caches at their widest."""
    sampler = setup.sampler(compiler.group)
    (b, _), mesh = setup.table(compiler.group), setup.mesh
    others = (setup.opt_state, *setup.beside(compiler.group))
    row = [[0] * b.branch[-1]] * b.fan_out[-1]
    lengths = Lengths([b.prefix[-1]] * count, [[b.branch[-1]] * b.fan_out[-1]] * count, sampler.apart)
    plan = Plan([], [[0] * b.prefix[-1]] * count, lengths, b)
    schedule = Schedule(lengths, b, sampler.new_tokens, sampler.shards)
    options = dict(top_k=sampler.sampling.top_k, truncates=sampler.sampling.truncates)
    rule, number = _everywhere(sampler.rule, mesh), _everywhere(np.int32(0), mesh)
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), mesh)

    replaces = None
    if compiler.group == "grade" and sampler.int8_weights != setup.rollout.int8_weights:
        others = (*others, setup.decoding)  # of other types, so the grader's lie beside them
    elif compiler.group == "grade" and setup.config.frozen_grades:
        replaces = setup.decoding
    decoder = compiler(
        unstack, sampler.graphdef, setup.params, replaces, mesh, sampler.int8_weights, held=others
    )
    wave = schedule.next_wave()
    prefix, width, shift = schedule.sizes(wave)
    running = compiler(
        empty, key, sampler.config, sampler.dtype, sampler.int8_caches,
        rows=schedule.row.size, cells=schedule.cells, slots=schedule.length.size,
        shards=sampler.shards, prefix=prefix, width=width, held=(setup.params, decoder, others),
    )  # fmt: skip
    schedule.resized(prefix, width, shift)

    tree, _ = pack(wave, plan, [row] * count, range(count))
    tree = _on_mesh(tree, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), tree.branch_lengths.shape))
    widest = _wide(running, prefix, schedule.widths[-1])
    arrived = compiler(prefill, sampler.graphdef, setup.params, tree, held=(decoder, widest, others))
    places = _on_mesh(schedule.enter(wave), mesh)
    held = (setup.params, others)
    compiler(
        admit, sampler.decoder, decoder, widest, *arrived, tree, _on_mesh(keys, mesh), places, rule,
        **options, held=held,
    )  # fmt: skip
    if len(schedule.widths) > 1:
        narrower = _wide(running, prefix, schedule.widths[-2])
        compiler(resize, narrower, number, prefix=prefix, width=schedule.widths[-1], held=(decoder, *held))
    compiler(
        decode, sampler.decoder, decoder, widest, rule, number, chunk=schedule.chunk, **options, held=held
    )


def verdicts(compiler: Compiler, setup: Setup) -> None:
    """The largest wave of verdicts that are read off the logits."""
    b, _ = setup.table("grade")
    wave = Wave((-1,) * b.rows[-1], b.prefix[-1], b.fan_out[-1], b.branch[-1], lanes=b.fan_out[-1])
    tree, _ = pack(wave, Plan([], [], Lengths([], []), b), [], [])
    compiler(
        next_logprobs, setup.graphdef, setup.params, _on_mesh(tree, setup.mesh), np.zeros(2, np.int32),
        held=(setup.opt_state, setup.decoding, *setup.beside("grade")),
    )  # fmt: skip


def largest_minibatch(setup: Setup) -> UpdateBatch:
    """Shapes of a minibatch of the longest prompts and completions."""
    c = setup.config
    prompt = [0] * c.rollout.prompt_buckets[-1]
    size = c.rollout.max_new_tokens
    completion = Completion(np.zeros(size, np.int32), np.zeros(size, np.float32), True)
    batch = pack_groups(
        [prompt] * c.prompts_per_step,
        [[completion] * c.group_size] * c.prompts_per_step,
        np.ones((c.prompts_per_step, c.group_size), bool),
        c.rollout.prompt_buckets,
        c.rollout.completion_buckets,
    )
    return _on_mesh(split_batch(batch, c.optimizer.minibatches, c.optimizer.microbatch)[0], setup.mesh, 1)


def logprobs(compiler: Compiler, setup: Setup) -> None:
    """Log-probabilities of a minibatch under the reference, or the policy before its updates."""
    temperature = setup.config.rollout.sampling.temperature
    held = (setup.opt_state, *setup.beside("logprob"))
    compiler(
        completion_logprobs, setup.graphdef, setup.params, largest_minibatch(setup), temperature, held=held
    )


def update(compiler: Compiler, setup: Setup) -> None:
    """One update by a minibatch."""
    program = make_update(setup.graphdef, setup.config, make_optimizer(setup.config.optimizer))
    compiler(
        program, setup.learnt, setup.opt_state, largest_minibatch(setup), setup.base,
        held=setup.beside("update"),
    )  # fmt: skip


def bytes_here(tree: Any) -> int:
    """Of a tree of shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


def _placed(tree: Any, places: Any) -> Any:
    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda x, s: x.replace(_shaped(x, s)), tree, places, is_leaf=is_leaf)


def _on_mesh(arrays: Any, mesh: jax.sharding.Mesh, row_axis: int = 0) -> Any:
    """What `place_batch` would make of them, in shapes."""
    return jax.tree.map(lambda x: _shaped(x, batch_sharding(mesh, row_axis)), arrays)


def _shaped(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _everywhere(arrays: Any, mesh: jax.sharding.Mesh) -> Any:
    whole = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: _shaped(x, whole), arrays)


def _wide(running: Running, prefix: int, width: int) -> Running:
    """The shapes of what runs, with the caches of own tokens at another width."""
    zero = jax.ShapeDtypeStruct((), np.int32)
    wide = jax.eval_shape(lambda *args: resize(*args, prefix=prefix, width=width), running, zero)
    return jax.tree.map(lambda x, old: _shaped(x, old.sharding), wide, running)


def _options() -> dict[str, Any]:
    if platform() != "tpu":
        return {}
    old = jax.__version__.startswith("0.10.")
    return {"exec_time_optimization_effort": -1.0} if old else {"optimization_level": "O0"}


def _peak(memory: Any) -> int:
    """The CPU's compiler knows no peak: all that it lays out there."""
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(memory.peak_memory_in_bytes or parts - memory.alias_size_in_bytes)


def _refused_array(message: str) -> str:
    """The largest array that a refusal lists."""
    return largest_array(message.replace("Shape:", " = "))
