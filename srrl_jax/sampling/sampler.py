"""The sampler: lists of tokens in, completions out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.kernels import gpu_prefill
from srrl_jax.kernels.packed import Pack
from srrl_jax.models import Qwen3
from srrl_jax.parallel import (
    ROLLOUT_RULES,
    batch_sharding,
    place_batch,
    replicate,
    row_shards,
    shardings,
    to_host,
)
from srrl_jax.programs import Program, placed, shapes_of
from srrl_jax.sampling.decoder import Decoder, KeysValues
from srrl_jax.sampling.engine import ANY_KEY, Arrivals, SamplingParams, make_programs, steps_per_sync
from srrl_jax.sampling.scheduler import Batch, Scheduler, batches, sort_rows
from srrl_jax.sampling.shapes import MOST_STEPS, Memory, RowLengths, default_budget, plan_shapes
from srrl_jax.sampling.tokens import SamplingConfig

Tokens = Sequence[int]
OnProgress = Callable[[int, int], None]


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
    """Weights as training keeps them, and as decoding takes them, see `Sampler.prepare`."""

    params: Any
    decoder: Any
    int8: bool


class Sampler:
    """Batched sampling of branches that share prefixes; serves rollouts and grading alike.

    Args:
      model: only its structure is kept; the weights come with each call, so that the policy samples
        at its current weights.
      rows: lengths of the rows to come, or of a sample of them that has the longest: what is compiled
        follows from them (`plan_shapes`).
      new_tokens: limit of each completion.
      stop_ids: any of these tokens ends a completion.
      together: rows of a call, as many of which as the memory holds run at a time; all of `rows` by default.
      shared: tokens that all prefixes begin with (a grader's instructions), computed once for a call.
      sampling: how tokens are drawn.
      allowed: ids from here on are never sampled (the tokenizer's size); default: all may be.
      mesh: where to run, rows cut over its data, fsdp and expert axes.
      memory_gb: GB (1e9 bytes) of each device that sampling may take beside the weights; with longer rows
        fewer run at one time. Default: half of the device's memory, of the machine's on a CPU.
      int8: decode with "weights" in 8 bits (see `Decoder`), or with K/V caches too; what is given is
        prefilled with the weights as they are.
    Raises:
      InputError: more tokens than the model has positions, or than the memory holds.

    Two completions of one prompt, by a `Qwen3`:

    >>> import jax
    >>> from flax import nnx
    >>> from srrl_jax.sampling import RowLengths, Sampler
    >>> prompt = [5, 6, 7]
    >>> sampler = Sampler(model, [RowLengths(len(prompt), [0, 0])], new_tokens=4, stop_ids=[2])
    >>> groups = sampler.generate(nnx.state(model), [prompt], [[[], []]], jax.random.key(0))
    >>> [len(completion.tokens) <= 4 for completion in groups[0]]
    [True, True]
    """

    def __init__(
        self,
        model: Qwen3,
        rows: Iterable[RowLengths],
        *,
        new_tokens: int,
        stop_ids: Sequence[int],
        together: int | None = None,
        shared: Tokens = (),
        sampling: SamplingConfig = SamplingConfig(),
        allowed: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        memory_gb: float | None = None,
        int8: Literal["none", "weights", "weights_kv"] = "none",
    ):
        if new_tokens < 1:
            raise InputError(f"new_tokens must be at least 1, not {new_tokens}")
        c, rows = model.config, [RowLengths(*row) for row in rows]
        longest = max((row.prefix + max(row.branches, default=0) for row in rows), default=0) + new_tokens
        if longest > c.max_position_embeddings:
            raise InputError(
                f"prefix + branch + new tokens reach {longest} positions, but the model has "
                f"max_position_embeddings {c.max_position_embeddings}"
            )
        self.mesh = mesh
        self.new_tokens, self.sampling, self.stop_ids = new_tokens, sampling, tuple(stop_ids)
        whole = gpu_prefill.KEYS if gpu_prefill.computes(c.head_dim, c.windows is not None) else 1
        self.allowed, self.shared = allowed or c.vocab_size, tuple(shared[: len(shared) // whole * whole])
        self.int8_weights = int8 != "none"
        self.shards = 1 if mesh is None else row_shards(mesh)
        self.memory = Memory(
            c,
            model.dtype,
            default_budget() if memory_gb is None else int(memory_gb * 1e9),
            tensor=1 if mesh is None else mesh.shape["tensor"],
            shards=self.shards,
        )
        self.shapes = plan_shapes(
            [self._rest(row) for row in rows],
            new_tokens,
            self.memory,
            together=together or len(rows),
            positions=c.max_position_embeddings - len(self.shared),
        )
        self.graphdef = graphdef = nnx.graphdef(model)
        decoder = nnx.eval_shape(
            lambda params: Decoder(nnx.merge(graphdef, params), self.int8_weights), nnx.state(model)
        )
        structure, self.decoder = nnx.split(decoder)
        steps = min(MOST_STEPS, new_tokens)
        # Most tokens that a call of decoding samples.
        self.chunk = -(-steps // steps_per_sync()) * steps_per_sync()
        self.jitted = make_programs(
            graphdef,
            structure,
            jax.tree.structure(self.decoder),
            c,
            self.shapes,
            mesh,
            jnp.dtype(model.dtype),
            (self.int8_weights, int8 == "weights_kv"),
            self.chunk,
            sampling.top_k,
            sampling.truncates,
        )

    def generate(
        self,
        params: Any,
        prefixes: Sequence[Tokens],
        branches: Sequence[Sequence[Tokens]],
        key: jax.Array,
        row_ids: Sequence[int] | None = None,
        on_progress: OnProgress = lambda done, total: None,
        stop_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples every branch of every prefix.

        Args:
          params: `nnx.state` of the model, or what `prepare` made of it.
          prefixes: token ids of each row, at least one.
          branches: for each row, the given tokens of each of its branches; `[[]] * G` samples G
            completions of the prefix itself.
          key: a typed random key. Token i of branch b of a row is drawn with the key folded with
            (row id, b, i): independent of order, padding, scheduling and mesh.
          row_ids: a number for each row to fold in; its index by default.
          on_progress: told branches finished and their total after each chunk of tokens.
          stop_ids: in place of those of the sampler.
        Raises:
          InputError: a row that is over the lengths that were planned with; nothing has run by then.
        """
        stop_ids = self.stop_ids if stop_ids is None else tuple(stop_ids)
        row_ids = range(len(prefixes)) if row_ids is None else row_ids
        rows, prefixes, order = self._rows(prefixes, branches)
        scheduler = Scheduler(rows, order, self.shapes, self.shards)
        drawn: list[list[tuple[list, list]]] = [[([], []) for _ in row] for row in branches]
        total, done = sum(map(len, branches)), 0
        weights = self.prepare(params)
        shared, shared_cache = self._begin(weights.params)
        rule, key = self._everywhere(self.sampling_params(stop_ids)), self._key(key)
        state, end, widths = self.jitted.empty(key), 0, self.shapes.widths
        decoder = tuple(jax.tree.leaves(weights.decoder))
        while scheduler.waiting or scheduler.running.any():
            while batch := scheduler.next_batch():
                arrivals = self._pack(batch, prefixes, branches, row_ids)
                arrivals, admission = self._place(arrivals), self._place(scheduler.admit(batch))
                state = self.jitted.enter(weights.params, shared, state, arrivals, admission, key)
            while len(widths) > 1 and end + self.chunk > widths[0]:
                widths = widths[1:]
            exit_threshold = self._everywhere(np.int32(scheduler.early_exit_threshold()))
            out, state = self.jitted.decode(
                decoder, shared_cache, state, rule, exit_threshold, width=widths[0]
            )
            out = jax.device_get(out)
            for slot, row, b in scheduler.branches():
                tokens, logprobs = drawn[row][b]
                tokens.append(out.tokens[slot, : out.counts[slot]])
                logprobs.append(out.logprobs[slot, : out.counts[slot]])
                done += not out.alive[slot]
            scheduler.finish(out.alive)
            end += int(out.counts.max())
            on_progress(done, total)

        def completion(tokens: list[np.ndarray], logprobs: list[np.ndarray]) -> Completion:
            tokens = np.concatenate(tokens)
            return Completion(tokens, np.concatenate(logprobs), int(tokens[-1]) not in stop_ids)

        return [[completion(*branch) for branch in row] for row in drawn]

    def score(
        self,
        params: Any,
        prefixes: Sequence[Tokens],
        branches: Sequence[Sequence[Tokens]],
        candidates: Sequence[int],
        on_progress: OnProgress = lambda done, total: None,
    ) -> list[np.ndarray]:
        """Log-probabilities of `candidates` as the token that comes next after each branch.

        The prefill of `generate` and nothing more.

        Args:
          params, prefixes, branches, on_progress: as in `generate`.
          candidates: C token ids.
        Returns:
          For each row float32 [its branches, C], of the softmax over the whole vocabulary at temperature 1.
        Raises:
          InputError: as `generate`.
        """
        rows, prefixes, order = self._rows(prefixes, branches)
        params = params.params if isinstance(params, Weights) else params
        shared, _ = self._begin(params)
        results: list[np.ndarray] = [np.zeros((0, len(candidates)), np.float32)] * len(prefixes)
        total, done = sum(map(len, branches)), 0
        candidates = self._everywhere(np.asarray(candidates, np.int32))

        def take(batch: Batch, found: jax.Array) -> None:
            nonlocal done
            for of_shard, entered in zip(to_host(found), batch, strict=True):
                for scored, row in zip(of_shard, entered, strict=False):
                    results[row] = scored[: len(branches[row])]
                    done += len(branches[row])
            on_progress(done, total)

        started = deque()
        for batch in batches(rows, order, self.shapes, self.shards):
            packed = self._pack(batch, prefixes, branches, range(len(rows)), whole=True)
            started.append((batch, self.jitted.score(params, shared, self._place(packed), candidates)))
            if len(started) > 1:  # the device goes on while the host takes what is done
                take(*started.popleft())
        for last in started:
            take(*last)
        return results

    def holds(self, row: RowLengths) -> bool:
        """Whether a row of such lengths fits what was planned."""
        return self.shapes.hold(self._rest(row))

    def prepare(self, params: Any, replaces: Weights | None = None) -> Weights:
        """What `generate` makes of weights before anything else, to be made once for several calls.

        What another sampler of the same model has prepared is taken as it is, unless for 8 bits.

        Args:
          replaces: weights prepared before and done with. Their decoding layout is donated, so that there are
            never two; what they were made of is left alone.
        """
        if isinstance(params, Weights):
            if params.int8 == self.int8_weights:
                return params
            params = params.params
        old = replaces.decoder if replaces and replaces.int8 == self.int8_weights else None
        return Weights(params, self.jitted.prepare(params, old), self.int8_weights)

    def programs(
        self, params: Any, scores: bool = False, stop_ids: Sequence[int] | None = None
    ) -> Iterator[Program]:
        """What `prepare` and `generate` (or `score`) run, to be compiled ahead; under the mesh.

        Args:
          params: weights, or their shapes with placements.
          stop_ids: as in `generate`.
        """
        jitted, params, packs = self.jitted, shapes_of(params), f"{self.shards} x {self.shapes.pack}"
        shared, cache = (), KeysValues()
        if self.shared:
            tokens = self._shapes(np.zeros(len(self.shared), np.int32), everywhere=True)
            yield Program("shared prefix", str(len(self.shared)), jitted.begin, (params, tokens))
            shared, cache = placed(jax.eval_shape(jitted.begin, params, tokens), jitted.shared_places)
        nothing: Batch = [[]] * self.shards
        arrivals = self._shapes(self._pack(nothing, [], [], []))
        if scores:
            ids = self._shapes(np.zeros(2, np.int32), everywhere=True)
            yield Program("score", packs, jitted.score, (params, shared, arrivals, ids))
            return
        yield self.relayout(params)
        key = self._shapes(ANY_KEY, everywhere=True)
        yield Program("empty caches", "", jitted.empty, (key,))
        state = placed(jax.eval_shape(jitted.empty, key), jitted.places)
        admission = self._shapes(Scheduler([], [], self.shapes, self.shards).admit(nothing))
        yield Program("prefill", packs, jitted.enter, (params, shared, state, arrivals, admission, key))
        rule = self.sampling_params(self.stop_ids if stop_ids is None else stop_ids)
        rule, exit_threshold = self._shapes((rule, np.int32(0)), everywhere=True)
        args = (tuple(jax.tree.leaves(self.decoding)), cache, state, rule, exit_threshold)
        for width in self.shapes.widths:
            yield Program("decode", f"{self.shapes.slots} x {width}", jitted.decode, args, {"width": width})

    def relayout(self, params: Any, replaces: bool = False) -> Program:
        """What `prepare` runs, alone or with earlier weights that it replaces."""
        args = (shapes_of(params), self.decoding if replaces else None)
        return Program("relayout", "in place of another" if replaces else "", self.jitted.prepare, args)

    @property
    def decoding(self) -> Any:
        """Shapes of what `prepare` makes of weights, and where they lie."""
        if self.mesh is None:
            return self.decoder
        return placed(self.decoder, shardings(self.decoder, self.mesh, ROLLOUT_RULES))

    def sampling_params(self, stop_ids: Sequence[int]) -> SamplingParams:
        """On the host."""
        s = self.sampling
        floats = (np.float32(x) for x in (s.temperature, s.top_p, s.min_p))
        stops = np.asarray(stop_ids, np.int32)
        return SamplingParams(*floats, np.int32(self.allowed), stops, np.int32(self.new_tokens))

    def _rest(self, row: RowLengths) -> RowLengths:
        """What follows the tokens that all prefixes begin with."""
        return RowLengths(row.prefix - len(self.shared), row.branches)

    def _rows(self, prefixes: Sequence[Tokens], branches: Sequence[Sequence[Tokens]]):
        """Lengths of each row after the shared tokens, the rest of the prefixes, and their order."""
        cut = len(self.shared)
        for index, prefix in enumerate(prefixes):
            if tuple(prefix[:cut]) != self.shared:
                raise InputError(f"row {index}: does not begin with the {cut} shared tokens of this sampler")
        rests = [prefix[cut:] for prefix in prefixes]
        rows = [
            RowLengths(len(prefix), list(map(len, row))) for prefix, row in zip(rests, branches, strict=True)
        ]
        return rows, rests, sort_rows(rows, self.shapes)

    def _begin(self, params: Any) -> tuple[tuple, KeysValues]:
        """Keys and values of the shared tokens, for prefill and for decoding."""
        if not self.shared:
            return (), KeysValues()
        return self.jitted.begin(params, self._everywhere(np.asarray(self.shared, np.int32)))

    def _everywhere(self, values):
        """On every device."""
        return jax.device_put(values) if self.mesh is None else replicate(values, self.mesh)

    def _key(self, key: jax.Array) -> jax.Array:
        """A random key on every device; its numbers travel, since a key itself is no host array."""
        numbers = self._everywhere(np.asarray(jax.random.key_data(key)))
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(key))

    def _place(self, arrays):
        return jax.device_put(arrays) if self.mesh is None else place_batch(arrays, self.mesh)

    def _shapes(self, arrays, everywhere: bool = False):
        """Of host arrays, as they will lie on the devices: as a batch, or on all of them."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        if self.mesh is None:
            return shapes
        return placed(shapes, NamedSharding(self.mesh, P()) if everywhere else batch_sharding(self.mesh))

    def _pack(
        self, batch: Batch, prefixes: Sequence[Tokens], branches, row_ids, whole: bool = False
    ) -> Arrivals:
        """Lays the rows of a batch one behind another, on the host.

        Decoding starts with the last token given to a branch, where it has none with that of its prefix, so
        that token is left out (unless `whole`). Where some branches of a row have none and some have,
        the prefix's last token is given to each of them.
        """
        shards, size, n, b = self.shards, self.shapes.pack, self.shapes.packed, self.shapes.fan_out
        place = np.tile(np.arange(size, dtype=np.int32), (shards, 1))
        tokens, ends = np.zeros((2, shards, size), np.int32)
        pack = Pack(tokens, np.full_like(tokens, -1), begins=place, ends=ends, starts=place.copy())
        packed = Arrivals(
            pack,
            np.full((shards, n), size, np.int32),
            np.zeros((shards, n), np.int32),
            *np.zeros((3, shards, n, b), np.int32),
            ids=np.zeros((shards, n), np.uint32),
        )

        def lay(shard: int, begin: int, tokens: Tokens, position: int) -> slice:
            part = slice(begin, begin + len(tokens))
            pack.tokens[shard, part], pack.starts[shard, part] = tokens, begin
            pack.positions[shard, part] = len(self.shared) + position + np.arange(len(tokens))
            return part

        for shard, rows in enumerate(batch):
            begin = 0
            for index, row in enumerate(rows):
                at, prefix, given = (shard, index), prefixes[row], branches[row]
                if not whole:
                    if not all(map(len, given)):
                        prefix, given = prefix[:-1], [[prefix[-1], *branch] for branch in given]
                    packed.last[at][: len(given)] = [branch[-1] for branch in given]
                    given = [branch[:-1] for branch in given]
                packed.ids[at], packed.begins[at], packed.lengths[at] = row_ids[row], begin, len(prefix)
                stop = context = lay(shard, begin, prefix, 0).stop
                for number, branch in enumerate(given):
                    part = lay(shard, stop, branch, len(prefix))
                    pack.begins[shard, part], pack.ends[shard, part] = begin, context
                    packed.first[at][number], packed.ends[at][number] = part.start - begin, part.stop - begin
                    stop = part.stop
                begin = stop
        return packed
