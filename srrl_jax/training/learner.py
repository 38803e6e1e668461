"""What learns: the policy's weights, their frozen start, and the update."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.loading import abstract, read_config
from srrl_jax.errors import InputError
from srrl_jax.kernels.attention import check_kernel
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.models.lora import add_adapters, first_adapters
from srrl_jax.parallel import (
    batch_sharding,
    fingerprint,
    in_memory,
    place_batch,
    replicate,
    shardings,
    train_layout,
)
from srrl_jax.programs import Program, placed, shapes_of
from srrl_jax.sampling import Completion
from srrl_jax.training.batch import UpdateBatch, pack_groups, split_batch
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task
from srrl_jax.training.lessons import with_replies
from srrl_jax.training.memory import fits
from srrl_jax.training.shapes import UpdateShapes, plan_update
from srrl_jax.training.update import (
    NOTHING,
    TrainState,
    completion_logprobs,
    make_optimizer,
    make_schedule,
    make_update,
)


def build_model(config: TrainConfig, sizes: Qwen3Config | None = None) -> Qwen3:
    """The policy's structure, with its adapters but without values; of `sizes` instead of the model's own.

    Raises:
      InputError: the model, its adapters, the attention kernel on this machine, or a key for experts is not
        supported.
    """
    model = abstract(sizes or read_config(config.model), config.dtype)
    check_kernel(config.attention, config.dtype, slides=model.config.windows is not None)
    model.attention = config.attention
    if config.loss.balance_experts and model.config.moe is None:
        raise InputError("loss.balance_experts: the model has no experts; leave it false")
    if config.lora.rank:
        add_adapters(model, **dataclasses.asdict(config.lora))
    return model


def minibatch_shapes(
    config: TrainConfig, shapes: UpdateShapes, mesh: jax.sharding.Mesh
) -> dict[int, UpdateBatch]:
    """Those of a minibatch, for each size of its completions."""
    count = config.prompts_per_step // config.optimizer.minibatches
    found = {}
    for size in shapes.completions:
        completion = Completion(np.zeros(size, np.int32), np.zeros(size, np.float32), True)
        groups = [[completion] * config.group_size] * count
        batch = pack_groups([[0]] * count, groups, np.ones((count, config.group_size), bool), shapes)
        (part,) = split_batch(batch, 1, shapes.microbatch)
        found[size] = placed(part, batch_sharding(mesh, row_axis=1))
    return found


def update_programs(
    graphdef,
    update,
    config: TrainConfig,
    minibatches: Mapping[int, UpdateBatch],
    state: TrainState,
    base: Any,
    scored: Any | None,
) -> list[Program]:
    """Programs of updates, in shapes and placements.

    Args:
      update: of `make_update`.
      minibatches: by the length of their completions.
      state, base: weights and moments that are learnt, and the weights beside them.
      scored: weights under which log-probabilities are computed; None where none are.
    """
    found = []
    for size, part in minibatches.items():
        microbatches, rows, prompt = part.tree.prefix.shape
        sizes = f"{microbatches} x {rows} x ({prompt} + {config.group_size} x {size})"
        found.append(Program("update", sizes, update, (*state, part, base)))
        if scored is not None:
            args = (graphdef, scored, part, config.rollout.sampling.temperature)
            found.append(Program("log-probabilities", sizes, completion_logprobs, args))
    return found


def _on_device(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("device"))


def computed_in(dtype: Any, variables: Any) -> Any:
    """Within jit: weights in the type of the computation, which is what a forward pass makes of them."""
    return train_layout(jax.tree.map(lambda x: x.astype(dtype), variables))


class Learner:
    """Turns a step's completions and advantages into updates of the policy.

    Args:
      model: its structure alone; the weights are read from `config.model`.
      longest_prompt: in tokens.
    Raises:
      InputError: a microbatch that the mesh cannot cut.
    """

    @fits("weights")
    def __init__(self, model: Qwen3, config: TrainConfig, mesh: jax.sharding.Mesh, longest_prompt: int):
        self.shapes = plan_update(config, model, longest_prompt, mesh)
        self._config, self._mesh = config, mesh
        self.model_config = model.config
        self._graphdef = nnx.graphdef(model)
        learns_all = config.lora.rank == 0
        stored = jnp.float32 if learns_all else model.dtype  # what is learnt is summed up in float32
        self._start = nnx.state(load_model(config.model, mesh=mesh, dtype=stored))
        self._base = NOTHING  # what is not learnt
        self._cast = jax.jit(partial(computed_in, model.dtype)) if stored != model.dtype else None
        if not learns_all:
            shapes = nnx.state(model, nnx.LoRAParam)
            init = jax.jit(lambda key: first_adapters(shapes, key), out_shardings=shardings(shapes, mesh))
            self._base, self._start = self._start, init(jax.random.key(config.seed))
        self._optimizer = make_optimizer(config.optimizer)
        self._update = make_update(self._graphdef, config, self._optimizer, self.shapes.remat)
        self._schedule = make_schedule(config.optimizer)
        self._frozen = None  # as much of the starting weights as is not in `_base`
        if config.needs_frozen:
            copied = self._cast(self._start) if self._cast else jax.tree.map(jnp.copy, self._start)
            self._frozen = in_memory("pinned_host", copied) if config.reference == "host" else copied

    @property
    def frozen(self) -> Any:
        """The starting weights, to be had where `TrainConfig.needs_frozen`.

        With LoRA the policy's own, beside adapters that add nothing. From host memory each access brings
        another copy, to be let go after use.
        """
        return nnx.merge_state(in_memory("device", self._frozen), self._base)

    def fingerprint(self) -> str:
        """Of the weights that `model` names, for any change of a bit; to be called before `start`."""
        return f"{int(fingerprint(self._base if self._config.lora.rank else self._start)):08x}"

    @fits("weights")
    def init_state(self) -> TrainState:
        """The state before the first update. To be called once: updates donate its arrays."""
        params, self._start = self._start, None
        # The optimizer's counts too belong on the mesh: else each process has its own, which Orbax refuses.
        opt_state = jax.tree.map(
            lambda x: x if x.ndim else replicate(np.asarray(x), self._mesh), self._optimizer.init(params)
        )
        return TrainState(params, self._moments_in("pinned_host", opt_state))

    def policy(self, params: Any) -> Any:
        """All weights of the policy in the type of the computation, from those that are learnt."""
        return nnx.merge_state(self._cast(params) if self._cast else params, self._base)

    def learning_rate(self, step: int, skipped: int) -> float:
        """Of the last update of `step` (counted from 1), when so many were skipped since the start."""
        return float(self._schedule(max(0, step * self._config.optimizer.minibatches - 1 - skipped)))

    def minibatches(
        self,
        tasks: Sequence[Task],
        groups: Sequence[Sequence[Completion]],
        scored: np.ndarray,
        advantages: np.ndarray,
    ) -> list[UpdateBatch]:
        """The batches of a step's updates, on the mesh; `scored`, `advantages` [N, G]."""
        groups, scored, taught = with_replies(tasks, groups, scored, self._config.data.teacher_loss)
        prompts = [task.prompt for task in tasks]
        batch = pack_groups(prompts, groups, scored, self.shapes)
        batch = batch._replace(advantages=advantages, taught=taught)
        parts = split_batch(batch, self._config.optimizer.minibatches, self.shapes.microbatch)
        return [place_batch(part, self._mesh, row_axis=1) for part in parts]

    def programs(self, state: TrainState) -> list[Program]:
        """What updates, log-probabilities before them, and checkpoints run, given a state or its shapes."""
        state, base = jax.tree.map(_on_device, shapes_of(state)), shapes_of(self._base)
        minibatches = minibatch_shapes(self._config, self.shapes, self._mesh)
        weights = self.policy_shapes(state.params) if self.needs_logprobs else None
        found = update_programs(self._graphdef, self._update, self._config, minibatches, state, base, weights)
        if self._cast:
            found.append(Program("weights", f"in {self._config.dtype}", self._cast, (state.params,)))
        return [*found, Program("checksum", "of a checkpoint", fingerprint, (state,))]

    def policy_shapes(self, params: Any) -> Any:
        """Of what `policy` makes of such weights, or of their shapes."""
        params = shapes_of(params)
        if self._cast:
            params = placed(jax.eval_shape(self._cast, params), shardings(params, self._mesh))
        return nnx.merge_state(params, shapes_of(self._base))

    @property
    def needs_logprobs(self) -> bool:
        """Whether updates need log-probabilities other than the sampler's, see `with_logprobs`."""
        return self._config.kl_coef > 0 or self._config.loss.importance_cap is not None

    def with_logprobs(self, params: Any, minibatches: Sequence[UpdateBatch]) -> list[UpdateBatch]:
        """The same, with the log-probabilities of the frozen weights (for the KL penalty) and of the policy
        before its updates (for importance weights); returns when they are there."""
        scorers = {}
        if self._config.kl_coef > 0:
            scorers["reference_logprobs"] = self.frozen
        if self._config.loss.importance_cap is not None:
            scorers["old_logprobs"] = self.policy(params)
        temperature, scored = self._config.rollout.sampling.temperature, []
        for part in minibatches:
            found = {
                name: completion_logprobs(self._graphdef, weights, part, temperature)
                for name, weights in scorers.items()
            }
            scored.append(part._replace(**jax.block_until_ready(found)))
        return scored

    def update(
        self, state: TrainState, minibatches: Sequence[UpdateBatch]
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        """One AdamW update for each minibatch, in order; `state` is donated. The metrics of each."""
        learnt = []
        state = TrainState(state.params, self._moments_in("device", state.opt_state))
        for part in minibatches:
            params, opt_state, numbers = self._update(*state, part, self._base)
            state = TrainState(params, opt_state)
            learnt.append(numbers)
        return TrainState(params, self._moments_in("pinned_host", opt_state)), jax.device_get(learnt)

    def _moments_in(self, kind: str, opt_state: Any) -> Any:
        """In that memory and no more in the other, where `optimizer.moments` is the host."""
        if self._config.optimizer.moments == "device":
            return opt_state
        moved = jax.block_until_ready(in_memory(kind, opt_state))
        jax.tree.map(lambda x: x.delete(), opt_state)
        return moved
