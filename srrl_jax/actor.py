"""Who answers and grades: one set of weights in its two roles, in training and in evaluation alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.grading import Grader, WeightsJudge, opened_thought
from srrl_jax.programs import Program
from srrl_jax.rubrics import Message, visible_response
from srrl_jax.sampling import Completion, Sampler, Weights

OnProgress = Callable[[int, int], None]


class Answer(NamedTuple):
    """A completion: its whole text, what a user would see of it, its tokens, and whether it was cut off."""

    completion: str
    response: str
    tokens: int
    truncated: bool


def encode_prompt(tokenizer: Tokenizer, prompt: Sequence[Message], thinking: bool) -> tuple[list[int], str]:
    """The tokens up to where the completion begins; and "<think>" where the chat template has opened the
    thought, else "", see `opened_thought`."""
    rendered = tokenizer.render(list(prompt), thinking=thinking)
    return tokenizer.encode(rendered), opened_thought(rendered)


def read_completion(tokenizer: Tokenizer, opening: str, completion: Completion) -> Answer:
    """The text of a completion, after what `encode_prompt` says that the template has opened."""
    text = tokenizer.decode(completion.tokens.tolist())
    shown = visible_response(opening + text)
    return Answer(text, shown, len(completion.tokens), bool(completion.truncated))


class Actor:
    """Answers prompts and grades answers, with the weights that each call brings.

    Args:
      sampler: of answers.
      grader: with its sampler; None where it only answers.
    """

    def __init__(self, sampler: Sampler, grader: Grader | None = None):
        self.sampler, self.grader = sampler, grader

    def prepare(self, params: Any, replaces: Weights | None = None) -> Weights:
        """The weights as both roles take them: moved to the layout of decoding, and there.

        Those that they replace are of no use any more. What is prepared already stays as it is.
        """
        return jax.block_until_ready(self.sampler.prepare(params, replaces))

    def programs(self, params: Any, grades: bool = True, replaced: bool = False) -> Iterator[Program]:
        """What both roles run with such weights, or their shapes.

        Args:
          grades: whether they grade.
          replaced: whether other weights take their place, see `prepare`.
        """
        for program in self.sampler.programs(params):
            yield program._replace(kind=f"rollout/{program.kind}")
        for program in self.grader.programs(params) if grades else ():
            yield program._replace(kind=f"grade/{program.kind}")
        if replaced:
            yield self.grader.sampler.relayout(params, replaces=True)

    def answer(
        self,
        weights: Any,
        prompts: Sequence[Sequence[int]],
        samples: int,
        key: jax.Array,
        row_ids: Sequence[int],
        on_progress: OnProgress = lambda done, total: None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, which is read once for all of them.

        Those of prompt i draw from `key` folded with `row_ids[i]`; see `Sampler.generate` for the rest.
        """
        branches = [[[]] * samples for _ in prompts]
        return self.sampler.generate(
            weights, prompts, branches, key, row_ids=row_ids, on_progress=on_progress
        )

    def judge(self, weights: Any, key: jax.Array) -> WeightsJudge:
        """These weights as judge."""
        return WeightsJudge(self.grader, weights, key)
