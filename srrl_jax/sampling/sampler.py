"""The sampler: lists of tokens in, completions out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, TreeBatch
from srrl_jax.parallel import place_batch, row_shards
from srrl_jax.sampling.buckets import Buckets, Wave, plan_waves
from srrl_jax.sampling.decode import decode, prefill
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
    ):
        if new_tokens < 1:
            raise InputError(f"new_tokens must be at least 1, not {new_tokens}")
        cut = 1 if mesh is None else row_shards(mesh)
        if any(rows % cut for rows in buckets.rows):
            raise InputError(
                f"buckets.rows: {buckets.rows} must be multiples of mesh data x fsdp x expert = {cut}"
            )
        longest = buckets.prefix[-1] + buckets.branch[-1] + new_tokens
        if longest > model.config.max_position_embeddings:
            raise InputError(
                f"buckets: prefix + branch + new tokens reach {longest} positions, but the model has "
                f"max_position_embeddings {model.config.max_position_embeddings}"
            )
        self.graphdef = nnx.graphdef(model)
        self.buckets, self.new_tokens, self.sampling, self.mesh = (
            buckets,
            new_tokens,
            sampling,
            mesh,
        )
        self.allowed = allowed or model.config.vocab_size
        self.stop_ids = tuple(stop_ids)

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
          params: `nnx.state` of the model.
          prefixes: token ids of each row, at least one.
          branches: for each row, the given tokens of each of its branches; `[[]] * G` samples G
            completions of the prefix itself.
          key: a typed random key. Token i of branch b of a row is drawn with the key folded with
            (row id, b, i): independent of order, padding, waves and mesh.
          row_ids: a number for each row to fold in; its index by default.
          on_wave: told branches finished and their total after each wave.
        Raises:
          InputError: a row that the bucket table does not hold; nothing has run by then.
        """
        row_ids = range(len(prefixes)) if row_ids is None else row_ids
        lengths = [[len(branch) for branch in row] for row in branches]
        waves = plan_waves([len(prefix) for prefix in prefixes], lengths, self.buckets)
        results: list[list[Completion]] = [[] for _ in prefixes]
        total, done = sum(map(len, branches)), 0
        for wave in waves:
            decoded = self._run(params, wave, prefixes, branches, key, row_ids)
            for place, row in enumerate(wave.indices):
                results[row] = [
                    Completion(
                        decoded.tokens[place, b, :length],
                        decoded.logprobs[place, b, :length],
                        not decoded.stopped[place, b],
                    )
                    for b, length in enumerate(decoded.lengths[place, : len(branches[row])])
                ]
                done += len(branches[row])
            on_wave(done, total)
        return results

    def _run(self, params, wave: Wave, prefixes, branches, key, row_ids):
        tree, active, ids = pack(wave, prefixes, branches, row_ids)
        tree, active, ids = (self._place(x) for x in (tree, active, ids))
        state, prefix, own = prefill(self.graphdef, params, tree, new_tokens=self.new_tokens)
        s = self.sampling
        decoded, _ = decode(
            self.graphdef,
            params,
            state,
            prefix,
            own,
            tree,
            _branch_keys(key, ids, wave.fan_out),
            active,
            jnp.asarray(self.stop_ids, jnp.int32),
            tuple(jnp.float32(x) for x in (s.temperature, s.top_p, s.min_p)),
            new_tokens=self.new_tokens,
            top_k=s.top_k,
            truncates=s.truncates,
            allowed=jnp.int32(self.allowed),
        )
        return jax.device_get(decoded)

    def _place(self, arrays):
        return jax.device_put(arrays) if self.mesh is None else place_batch(arrays, self.mesh)


@jax.jit
def _fold(key, ids):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _branch_keys(key: jax.Array, ids: jax.Array, fan_out: int) -> jax.Array:
    """Keys [N, B] folded from row ids [N] and branch numbers."""
    return jax.vmap(_fold, (0, None))(_fold(key, ids), jnp.arange(fan_out))


def pack(wave: Wave, prefixes, branches, row_ids) -> tuple[TreeBatch, np.ndarray, np.ndarray]:
    """Pads the rows of a wave to its sizes: a host TreeBatch, active bool [N, B], row ids [N].

    A padding row is a prefix of one token.
    """
    tree = TreeBatch(
        np.zeros((wave.rows, wave.prefix), np.int32),
        np.ones(wave.rows, np.int32),
        np.zeros((wave.rows, wave.fan_out, wave.branch), np.int32),
        np.zeros((wave.rows, wave.fan_out), np.int32),
    )
    active = np.zeros((wave.rows, wave.fan_out), bool)
    ids = np.zeros(wave.rows, np.uint32)
    for place, row in enumerate(wave.indices):
        tree.prefix[place, : len(prefixes[row])] = prefixes[row]
        tree.prefix_lengths[place] = len(prefixes[row])
        ids[place] = row_ids[row]
        active[place, : len(branches[row])] = True
        for b, branch in enumerate(branches[row]):
            tree.branches[place, b, : len(branch)] = branch
            tree.branch_lengths[place, b] = len(branch)
    return tree, active, ids
