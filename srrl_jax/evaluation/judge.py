"""Who answers and who judges on the command line: checkpoints, each loaded once, or a teacher."""

import dataclasses
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.grading import (
    Grader,
    GradingItem,
    JudgeConfig,
    Teacher,
    TeacherConfig,
    Verdict,
    opened_thought,
)
from srrl_jax.models import Qwen3
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.rubrics import Message, template_sha256, visible_response
from srrl_jax.sampling import Buckets, Sampler, SamplingConfig
from srrl_jax.sampling.buckets import ladder


class Answer(NamedTuple):
    """A completion: its whole text, what a user would see of it, and how long it took."""

    completion: str
    response: str
    tokens: int
    truncated: bool


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How a checkpoint answers: limit in tokens, <think> block or none, sampling."""

    max_new_tokens: int = 1024
    thinking: bool = False
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_k=20, top_p=0.95)


class Checkpoint:
    """A model with its tokenizer, from a directory (safetensors or GGUF) or hub id.

    Args:
      source: where it lies.
      dtype: of the computation; weights stay float32.
      rows: prefixes that run at one time.
    """

    def __init__(self, source: str, dtype: str = "float32", rows: int = 8):
        self.name, self.rows = source, rows
        self.tokenizer = load_tokenizer(source)
        self.model = Qwen3.from_pretrained(source)
        self.model.dtype = jnp.dtype(dtype)
        self.params = nnx.state(self.model)

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
        rendered = [self.tokenizer.render(list(prompt), thinking=config.thinking) for prompt in prompts]
        tokens = [self.tokenizer.encode(text) for text in rendered]
        sampler = self._sampler(
            map(len, tokens), [0], (samples,), new_tokens=config.max_new_tokens, sampling=config.sampling
        )
        sampled = sampler.generate(self.params, tokens, [[[]] * samples] * len(tokens), key, row_ids=ids)
        return [
            [
                Answer(
                    text := self.tokenizer.decode(completion.tokens.tolist()),
                    visible_response(opened_thought(prompt) + text),
                    len(completion.tokens),
                    bool(completion.truncated),
                )
                for completion in group
            ]
            for prompt, group in zip(rendered, sampled, strict=True)
        ]

    def grade(self, items: Sequence[GradingItem], key: jax.Array, config: JudgeConfig) -> list[list[Verdict]]:
        """Verdicts of this checkpoint, drawn from `key` folded with the text of the items."""
        grader = Grader.at(config, self.tokenizer)
        prefixes, branches = zip(*map(grader.encode, items), strict=True)
        grader.sampler = self._sampler(
            map(len, prefixes),
            [len(branch) for row in branches for branch in row],
            Grader.fan_out(
                ladder((len(item.criteria) for item in items), least=4),
                config.verdict,
                config.votes,
                config.together,
            ),
            new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            trunk=grader.question.trunk,
        )
        texts = repr([(list(item.prompt), item.response) for item in items])
        return grader.grade(self.params, items, jax.random.fold_in(key, zlib.crc32(texts.encode())))

    def _sampler(self, prefixes, branches, fan_out, *, new_tokens, sampling, trunk=()) -> Sampler:
        branch, positions = ladder(branches), self.model.config.max_position_embeddings
        room = positions - branch[-1] - new_tokens
        if room < 1:
            raise InputError(
                f"{self.name}: a criterion of {branch[-1]} tokens and {new_tokens} new ones leave no room in "
                f"its {positions} positions (max_position_embeddings); shorten the template or the reply"
            )
        buckets = Buckets(
            tuple(sorted({min(size, room) for size in ladder(prefixes)})),
            fan_out,
            branch,
            (self.rows,),
            trunk,
        )
        return Sampler(
            self.model,
            buckets,
            new_tokens=new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            sampling=sampling,
            allowed=min(self.tokenizer.size, self.model.config.vocab_size),
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

    def grade(self, items: Sequence[GradingItem]) -> list[list[Verdict]]:
        return self.checkpoint.grade(items, self.key, self.config)


@contextmanager
def open_judge(
    grader: str | Checkpoint, config: JudgeConfig, *, seed: int, dtype: str, batch: int
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
        checkpoint = Checkpoint(grader, dtype, batch) if isinstance(grader, str) else grader
        yield CheckpointJudge(checkpoint, config, jax.random.fold_in(jax.random.key(seed), 1))
