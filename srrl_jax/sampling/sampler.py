"""The sampler: lists of tokens in, completions out."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3
from srrl_jax.models.attention import Segment, choose_kernel
from srrl_jax.models.decoder import Decoder, Trunk
from srrl_jax.models.tree import LaneBatch
from srrl_jax.parallel import place_batch, replicate, rollout_layout, row_shards
from srrl_jax.sampling.buckets import Buckets, Lengths, Wave, sort_rows
from srrl_jax.sampling.decode import Rule, Running, admit, begin, compact, decode, empty, prefill, resize
from srrl_jax.sampling.memory import default_budget, rows_within
from srrl_jax.sampling.schedule import CHUNK, Schedule
from srrl_jax.sampling.tokens import SamplingConfig


class Completion(NamedTuple):
    """One sampled branch.

    Attributes:
      tokens: int32 [length], the stop token included.
      logprobs: float32 [length], of softmax(logits / temperature), untruncated.
      truncated: true where no stop token came within the limit.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    truncated: bool


class Weights(NamedTuple):
    """Weights as training keeps them, and as decoding takes them (in 8 bits or not): see `Sampler.ready`."""

    params: Any
    decoder: Any
    int8: bool


class Plan(NamedTuple):
    """How a call is to run.

    Attributes:
      trunk: tokens that all prefixes begin with, computed once.
      prefixes: the rest of each.
      lengths: of these, and of the branches.
      buckets: the table for them, with as many rows at a time as the memory holds.
    """

    trunk: Sequence[int]
    prefixes: list[Sequence[int]]
    lengths: Lengths
    buckets: Buckets


class Sampler:
    """Batched sampling of branches that share prefixes; serves rollouts and grading alike.

    Args:
      model: only its structure is kept; the weights come with each call, so that the policy samples
        at its current weights.
      buckets: the shapes that may be compiled.
      new_tokens: limit of each completion.
      stop_ids: any of these tokens ends a completion.
      sampling: how tokens are drawn.
      allowed: ids from here on are never sampled (the tokenizer's size); default: all may be.
      mesh: where to run; rows of every bucket must divide by its data, fsdp and expert axes.
      memory_gb: GB (1e9 bytes) of each device that sampling may take beside the weights; with longer rows
        fewer run at one time. Default: half of the device's memory, of the machine's on a CPU.
      int8: decode with "weights" in 8 bits (see `Decoder`), or with K/V caches too; what is given is
        prefilled with the weights as they are.
    """

    def __init__(
        self,
        model: Qwen3,
        buckets: Buckets,
        *,
        new_tokens: int,
        stop_ids: Sequence[int],
        sampling: SamplingConfig = SamplingConfig(),
        allowed: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        memory_gb: float | None = None,
        int8: Literal["none", "weights", "weights_kv"] = "none",
    ):
        if new_tokens < 1:
            raise InputError(f"new_tokens must be at least 1, not {new_tokens}")
        cut = 1 if mesh is None else row_shards(mesh)
        if any(rows % cut for rows in buckets.rows):
            raise InputError(
                f"buckets.rows: {buckets.rows} must be multiples of mesh slice x data x fsdp x expert = {cut}"
            )
        longest = buckets.prefix[-1] + buckets.branch[-1] + new_tokens
        if longest > model.config.max_position_embeddings:
            raise InputError(
                f"buckets: prefix + branch + new tokens reach {longest} positions, but the model has "
                f"max_position_embeddings {model.config.max_position_embeddings}"
            )
        self.graphdef = nnx.graphdef(model)
        self.int8_weights, self.int8_caches = int8 != "none", int8 == "weights_kv"
        decoder = nnx.eval_shape(
            lambda params: Decoder(nnx.merge(self.graphdef, params), self.int8_weights), nnx.state(model)
        )
        self.decoder, self.decoding = nnx.split(decoder)  # structure and shapes of `unstack`'s result
        self.config, self.dtype, self.shards = model.config, model.dtype, cut
        kernel = choose_kernel(model.attention, model.dtype, model.config.windows is not None, tokens=2)
        # Splash's masks are made before lengths are known. Scores are written down by XLA alone.
        self.apart, self.has_scores = kernel == "splash", kernel == "xla"
        self.buckets, self.new_tokens, self.sampling, self.mesh = buckets, new_tokens, sampling, mesh
        self.allowed = allowed or model.config.vocab_size
        self.stop_ids = tuple(stop_ids)
        self.budget = default_budget() if memory_gb is None else int(memory_gb * 1e9)

    def generate(
        self,
        params: Any,
        prefixes: Sequence[Sequence[int]],
        branches: Sequence[Sequence[Sequence[int]]],
        key: jax.Array,
        row_ids: Sequence[int] | None = None,
        on_wave: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """Samples every branch of every prefix.

        Args:
          params: `nnx.state` of the model, or what `ready` made of it.
          prefixes: token ids of each row, at least one.
          branches: for each row, the given tokens of each of its branches; `[[]] * G` samples G
            completions of the prefix itself.
          key: a typed random key. Token i of branch b of a row is drawn with the key folded with
            (row id, b, i): independent of order, padding, waves and mesh.
          row_ids: a number for each row to fold in; its index by default.
          on_wave: told branches finished and their total after each chunk of tokens.
        Raises:
          InputError: a row that the bucket table or the memory does not hold; nothing has run by then.
        """
        row_ids = range(len(prefixes)) if row_ids is None else row_ids
        plan = self.plan(prefixes, branches)
        schedule = Schedule(plan.lengths, plan.buckets, self.new_tokens, self.shards)
        drawn: list[list[tuple[list, list]]] = [[([], []) for _ in row] for row in branches]
        total, done = sum(map(len, branches)), 0
        weights = self.ready(params)
        shared, trunk = self.begin(weights.params, plan.trunk)
        rule, running = self._put(self.rule), None
        options = dict(top_k=self.sampling.top_k, truncates=self.sampling.truncates)
        while schedule.waiting or schedule.running.any():
            firsts = []
            while wave := schedule.next_wave():
                running = self._resize(running, schedule, wave, key, trunk)
                arrived = self._prefill(weights.params, shared, wave, plan, branches, key, row_ids)
                places = self._place(schedule.enter(wave))
                token, logprob, running = admit(
                    self.decoder, weights.decoder, running, *arrived, places, rule, **options
                )
                firsts.append((wave, token, logprob))
            running = self._resize(running, schedule, None, key, trunk)
            out, running = decode(
                self.decoder,
                weights.decoder,
                running,
                rule,
                self._put(np.int32(schedule.enough())),
                chunk=schedule.chunk,
                **options,
            )
            firsts, out = jax.device_get((firsts, out))
            for wave, token, logprob in firsts:
                for seat, row in enumerate(wave.indices):
                    for b, (tokens, logprobs) in enumerate(drawn[row] if row >= 0 else ()):
                        tokens.append(token[seat, b : b + 1])
                        logprobs.append(logprob[seat, b : b + 1])
            for slot, row, b in schedule.branches():
                tokens, logprobs = drawn[row][b]
                tokens.append(out.tokens[slot, : out.counts[slot]])
                logprobs.append(out.logprobs[slot, : out.counts[slot]])
                done += not out.alive[slot]
            schedule.advance(out.counts, out.alive)
            if kept := schedule.compaction():
                running = compact(running, self._place(kept))
            on_wave(done, total)
        return [[self._completion(*branch) for branch in row] for row in drawn]

    def ready(self, params: Any, replaces: Weights | None = None) -> Weights:
        """What `generate` makes of weights before anything else, to be made once for several calls.

        What another sampler of the same model has made ready is taken as it is, unless for 8 bits.

        Args:
          replaces: weights made ready before and done with. Their decoding layout is donated, so that
            there are never two; what they were made of is left alone.
        """
        if isinstance(params, Weights):
            if params.int8 == self.int8_weights:
                return params
            params = params.params
        old = replaces.decoder if replaces and replaces.int8 == self.int8_weights else None
        decoder = unstack(self.graphdef, params, old, self.mesh, self.int8_weights)
        return Weights(params, decoder, self.int8_weights)

    def plan(self, prefixes: Sequence[Sequence[int]], branches: Sequence[Sequence[Sequence[int]]]) -> Plan:
        """How a call is to run.

        Raises:
          InputError: as `generate`.
        """
        lengths = Lengths(list(map(len, prefixes)), [list(map(len, row)) for row in branches], self.apart)
        sort_rows(lengths, self.buckets)  # complains of the whole lengths
        cut = self.buckets.shared(prefixes)
        rest, buckets = [prefix[cut:] for prefix in prefixes], self.buckets.after(cut)
        lengths = dataclasses.replace(lengths, prefix=list(map(len, rest)))
        tensor = 1 if self.mesh is None else self.mesh.shape["tensor"]
        rows = rows_within(
            self.budget, self.config, self.dtype, (self.shards, tensor), buckets, lengths, self.new_tokens,
            self.has_scores,
        )  # fmt: skip
        trunk = prefixes[0][:cut] if cut else []
        return Plan(trunk, rest, lengths, dataclasses.replace(buckets, rows=rows))

    def begin(self, params: Any, trunk: Sequence[int]) -> tuple[Segment | None, Trunk]:
        """The trunk's keys and values, for prefill and for decoding."""
        if not trunk:
            return None, Trunk()
        return begin(self.graphdef, params, self._put(np.asarray(trunk, np.int32)), self.int8_caches)

    def _completion(self, tokens: list[np.ndarray], logprobs: list[np.ndarray]) -> Completion:
        tokens = np.concatenate(tokens)
        return Completion(tokens, np.concatenate(logprobs), int(tokens[-1]) not in self.stop_ids)

    def _resize(
        self, running: Running | None, schedule: Schedule, wave: Wave | None, key, trunk: Trunk
    ) -> Running:
        """Gives the caches room for a wave to enter and for the next chunk."""
        prefix, width, shift = schedule.sizes(wave)
        if running is None:
            schedule.resized(prefix, width, shift)
            running = empty(
                key, self.config, self.dtype, self.int8_caches,
                rows=schedule.row.size, cells=schedule.cells, slots=schedule.length.size,
                shards=self.shards, prefix=prefix, width=width,
            )  # fmt: skip
            slots = running.slots._replace(end=self._put(np.int32(schedule.end)))
            return running._replace(trunk=trunk, slots=slots)
        if (prefix, width, shift) != (schedule.prefix, schedule.width, 0):
            running = resize(running, self._put(np.int32(shift)), prefix=prefix, width=width)
            schedule.resized(prefix, width, shift)
        return running

    def _prefill(self, params, trunk: Segment | None, wave: Wave, plan: Plan, branches, key, row_ids):
        """What `admit` takes of a wave."""
        tree, ids = pack(wave, plan, branches, row_ids)
        tree, ids = self._place(tree), self._place(ids)
        state, prefix, own = prefill(self.graphdef, params, tree, trunk)
        return state, prefix, own, tree, _branch_keys(key, ids, wave.fan_out)

    @property
    def chunk(self) -> int:
        """Tokens that one run of `decode` draws at most."""
        return min(CHUNK, self.new_tokens)

    @property
    def rule(self) -> Rule:
        """On the host."""
        s = self.sampling
        floats = (np.float32(x) for x in (s.temperature, s.top_p, s.min_p))
        stop_ids = np.asarray(self.stop_ids, np.int32)
        return Rule(*floats, np.int32(self.allowed), stop_ids, np.int32(self.new_tokens))

    def _put(self, values):
        """On every device."""
        return jax.device_put(values) if self.mesh is None else replicate(values, self.mesh)

    def _place(self, arrays):
        return jax.device_put(arrays) if self.mesh is None else place_batch(arrays, self.mesh)


@partial(jax.jit, static_argnames=("graphdef", "mesh", "int8"), donate_argnames="replaces", keep_unused=True)
def unstack(graphdef, params, replaces, mesh: jax.sharding.Mesh | None, int8: bool):
    """From the weights of training to those of a `Decoder`, in the layout of rollouts.

    Training goes on with `params`; what is donated is an earlier result, or None.
    """
    decoder = nnx.state(Decoder(nnx.merge(graphdef, params), int8))
    return decoder if mesh is None else rollout_layout(decoder, mesh)


@jax.jit
def _fold(key, ids):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _branch_keys(key: jax.Array, ids: jax.Array, fan_out: int) -> jax.Array:
    """Keys [N, B] folded from row ids [N] and branch numbers."""
    return jax.vmap(_fold, (0, None))(_fold(key, ids), jnp.arange(fan_out))


def pack(wave: Wave, plan: Plan, branches, row_ids) -> tuple[LaneBatch, np.ndarray]:
    """Pads the rows of a wave to its sizes: a host LaneBatch, and row ids [N].

    A padding row is a prefix of one token.
    """
    size = len(wave.indices)
    tree = LaneBatch(
        np.zeros((size, wave.prefix), np.int32),
        np.ones(size, np.int32),
        np.zeros((size, wave.lanes, wave.branch), np.int32),
        np.full((size, wave.lanes, wave.branch), -1, np.int32),
        np.zeros((size, wave.fan_out), np.int32),
        np.zeros((size, wave.fan_out), np.int32),
    )
    ids = np.zeros(size, np.uint32)
    for seat, row in enumerate(wave.indices):
        if row < 0:
            continue
        tree.prefix[seat, : len(plan.prefixes[row])] = plan.prefixes[row]
        tree.prefix_lengths[seat] = len(plan.prefixes[row])
        ids[seat] = row_ids[row]
        for b, (lane, first) in enumerate(plan.lengths.places(row, wave.branch) if wave.lanes else ()):
            tokens = branches[row][b]
            tree.lanes[seat, lane, first : first + len(tokens)] = tokens
            tree.owners[seat, lane, first : first + len(tokens)] = b
            tree.first[seat, b], tree.branch_lengths[seat, b] = lane * wave.branch + first, len(tokens)
    return tree, ids
