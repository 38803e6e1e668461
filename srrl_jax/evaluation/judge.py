"""Who answers and who judges on the command line: checkpoints, each loaded once, or a teacher."""

import dataclasses
import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.actor import Actor, Answer, OnProgress, encode_prompt, read_completion
from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.grading import (
    Grader,
    GradingItem,
    Judge,
    JudgeConfig,
    Teacher,
    TeacherConfig,
    Verdict,
)
from srrl_jax.parallel import MeshConfig, computing, fingerprint, make_mesh, row_shards
from srrl_jax.programs import fitting
from srrl_jax.rubrics import Message, template_sha256
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig

_LOWER = "Lower --batch or --max-new-tokens, give --dtype bfloat16, or a --mesh over more devices"


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How a checkpoint answers: limit in tokens, <think> block or none, sampling."""

    max_new_tokens: int = 1024
    thinking: bool = False
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_k=20, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How checkpoints run: prompts or responses at one time, type of weights and computation, mesh, seed."""

    batch: int = 8
    dtype: str = "float32"
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What changes samples and verdicts."""
        return {"dtype": self.dtype, "seed": self.seed}


class Checkpoint:
    """A model with its weights and its tokenizer, from a directory (safetensors or GGUF) or hub id.

    Attributes:
      identity: hashes of its "weights", "tokenizer" and "chat template". That of the weights is of every bit
        in the type that they are computed in, not of their files or times: a copy is the same.
    Raises:
      InputError: see `load_model` and `make_mesh`.
    """

    def __init__(self, source: str, runtime: Runtime = Runtime()):
        self.name, self.dtype, self.mesh = source, runtime.dtype, make_mesh(runtime.mesh)
        cut = row_shards(self.mesh)
        self.rows = -(-runtime.batch // cut) * cut
        self.tokenizer = load_tokenizer(source)
        with fitting(f"{source}: its weights", "Give --dtype bfloat16, or a --mesh over more devices"):
            self.model = load_model(source, mesh=self.mesh, dtype=jnp.dtype(runtime.dtype))
        self.weights = nnx.state(self.model)  # once prepared, both layouts
        texts = [hashlib.sha256(part).hexdigest() for part in self.tokenizer.made_of]
        self.identity = {"weights": f"{int(fingerprint(self.weights)):08x}"}
        self.identity |= zip(("tokenizer", "chat template"), texts, strict=True)

    def check_prompts(self, prompts: Sequence[tuple[str, Sequence[Message]]], config: AnswerConfig) -> None:
        """Refuses prompts, each with its name, that leave no room for a completion. Raises InputError."""
        sizes = [
            (name, len(encode_prompt(self.tokenizer, turns, config.thinking)[0])) for name, turns in prompts
        ]
        self._check(sizes, config.max_new_tokens, "prompts")

    def check_items(
        self, items: Sequence[tuple[str, GradingItem]], config: JudgeConfig, longest: int = 0
    ) -> None:
        """Refuses what is to be graded, each with its name, where it leaves no room for a verdict.

        Args:
          longest: tokens of the responses, where the items have none yet.
        Raises:
          InputError: lists them, the worst first.
        """
        rows, _ = Grader.at(config, self.tokenizer).lengths(item for _, item in items)
        sizes = [
            (name, row.prefix + longest + max(row.branches))
            for (name, _), row in zip(items, rows, strict=True)
        ]
        self._check(sizes, config.max_new_tokens, "prompts of the grader, with response and criterion,")

    def _check(self, sizes: Sequence[tuple[str, int]], new_tokens: int, what: str) -> None:
        positions = self.model.config.max_position_embeddings
        over = sorted((pair for pair in sizes if pair[1] + new_tokens > positions), key=lambda pair: -pair[1])
        if over:
            lines = [f"{name}: {size} tokens" for name, size in over[:20]]
            lines += [f"and {len(over) - 20} more"] if len(over) > 20 else []
            raise InputError(
                f"{len(over)} {what} are with {new_tokens} new tokens over the {positions} positions of "
                f"{self.name} (max_position_embeddings), the worst first:\n  "
                + "\n  ".join(lines)
                + "\nlower the limits of new tokens, or leave these rows out"
            )

    def answer(
        self, prompts: Sequence[Sequence[Message]], ids: Sequence[int], key: jax.Array, config: AnswerConfig
    ) -> list[Answer]:
        """One completion of each prompt; that of prompt i draws from `key` folded with `ids[i]`."""
        return [group[0] for group in self.answers(prompts, ids, key, config, 1)]

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        ids: Sequence[int],
        key: jax.Array,
        config: AnswerConfig,
        samples: int,
    ) -> list[list[Answer]]:
        """As `answer`, with several completions of each prompt, which is read once for all of them."""
        asked = [encode_prompt(self.tokenizer, prompt, config.thinking) for prompt in prompts]
        tokens = [prompt for prompt, _ in asked]
        actor = Actor(self._sampler(config, [RowLengths(len(prompt), [0] * samples) for prompt in tokens]))
        with fitting(f"{self.name}: sampling", _LOWER), computing(self.mesh, self.dtype):
            self.weights = actor.prepare(self.weights)
            groups = actor.answer(self.weights, tokens, samples, key, ids)
        return [
            [read_completion(self.tokenizer, opening, completion) for completion in group]
            for (_, opening), group in zip(asked, groups, strict=True)
        ]

    def grade(
        self,
        items: Sequence[GradingItem],
        key: jax.Array,
        config: JudgeConfig,
        on_progress: OnProgress = lambda done, total: None,
    ) -> list[list[Verdict]]:
        """Verdicts of this checkpoint, drawn from `key` folded with the text of the items."""
        grader = Grader.at(config, self.tokenizer)
        grader.sampler = self._sampler(config, *grader.lengths(items))
        texts = repr([(list(item.prompt), item.response) for item in items])
        key = jax.random.fold_in(key, zlib.crc32(texts.encode()))
        actor = Actor(grader.sampler, grader)
        with fitting(f"{self.name}: grading", _LOWER), computing(self.mesh, self.dtype):
            if config.verdict == "generate":  # else nothing is decoded
                self.weights = actor.prepare(self.weights)
            return actor.judge(self.weights, key).grade(items, on_progress)

    def _sampler(
        self, config: AnswerConfig | JudgeConfig, rows: Sequence[RowLengths], shared: Sequence[int] = ()
    ) -> Sampler:
        positions = self.model.config.max_position_embeddings
        longest = max(row.prefix + max(row.branches) for row in rows)
        if longest + config.max_new_tokens > positions:
            raise InputError(
                f"{self.name}: a prompt of {longest} tokens and {config.max_new_tokens} new ones are over "
                f"its {positions} positions (max_position_embeddings); lower the limit of new tokens, or "
                "shorten the input"
            )
        return Sampler(
            self.model,
            rows,
            together=self.rows,
            new_tokens=config.max_new_tokens,
            shared=shared,
            stop_ids=self.tokenizer.stop_ids,
            sampling=config.sampling,
            allowed=min(self.tokenizer.size, self.model.config.vocab_size),
            mesh=self.mesh,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointJudge:
    """A checkpoint as judge, with its settings and its random stream."""

    checkpoint: Checkpoint
    config: JudgeConfig
    key: jax.Array

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def settings(self) -> dict[str, Any]:
        digest = template_sha256(self.config.read_template())
        return dataclasses.asdict(self.config) | {"template_sha256": digest}

    def grade(
        self, items: Sequence[GradingItem], on_progress: OnProgress = lambda done, total: None
    ) -> list[list[Verdict]]:
        return self.checkpoint.grade(items, self.key, self.config, on_progress)


def check_items(judge: Judge, items: Sequence[tuple[str, GradingItem]], longest: int = 0) -> None:
    """Refuses what is too long for a judge whose positions are known, see `Checkpoint.check_items`."""
    if isinstance(judge, CheckpointJudge):
        judge.checkpoint.check_items(items, judge.config, longest)


def identity_of(answering: Checkpoint | None, judge: Judge | None) -> dict[str, str]:
    """`Checkpoint.identity` of who answers, and of who judges where that is another checkpoint."""
    found = dict(answering.identity) if answering else {}
    if isinstance(judge, CheckpointJudge) and judge.checkpoint is not answering:
        found |= {f"grader's {name}": value for name, value in judge.checkpoint.identity.items()}
    return found


@contextmanager
def open_judge(
    grader: str | Checkpoint, config: JudgeConfig, runtime: Runtime
) -> Iterator[CheckpointJudge | Teacher]:
    """The judge that a command line names: a checkpoint, or the YAML file of a teacher.

    What a teacher was asked and paid is printed at the end. Raises InputError: see `Checkpoint`,
    `TeacherConfig.load` and `Teacher`; or a teacher is given a `config` that is not the default.
    """
    if isinstance(grader, str) and grader.endswith((".yaml", ".yml")):
        if config != JudgeConfig():
            raise InputError(
                f"{grader}: how a teacher is asked (template, tries, votes, ...) stands in its file; "
                "leave the options out"
            )
        with Teacher(TeacherConfig.load(grader)) as teacher:
            try:
                yield teacher
            finally:
                print(f"teacher {teacher.name}: {teacher.usage}", file=sys.stderr)
    else:
        config.read_template()  # what is wrong with it is told before weights are loaded
        checkpoint = Checkpoint(grader, runtime) if isinstance(grader, str) else grader
        yield CheckpointJudge(checkpoint, config, jax.random.fold_in(jax.random.key(runtime.seed), 1))
