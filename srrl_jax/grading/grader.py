"""Rubric grading by the model itself.

Every response is a prefix (instructions, conversation, response), every criterion a branch of it:
the response is read once, whatever the number of its criteria.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from srrl_jax.models.tokenizer import Tokenizer
from srrl_jax.rubrics import (
    Criterion,
    Message,
    criterion_prompt,
    grader_prompt,
    parse_explanation,
    parse_verdict,
)
from srrl_jax.sampling import Sampler

_HERE = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}criterion\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"


class GradingItem(NamedTuple):
    """A response as a user would see it, its conversation, and the criteria to judge it by."""

    prompt: Sequence[Message]
    response: str
    criteria: Sequence[Criterion]


class Verdict(NamedTuple):
    """What the grader said of one criterion.

    Attributes:
      met: None where no reply could be read: unscorable, which neither helps nor hurts.
      explanation: the grader's reason, or "".
      tries: replies that were sampled.
      tokens: sampled in all of them.
    """

    met: bool | None
    explanation: str
    tries: int
    tokens: int


def split_chat(render: Callable[[list[Message]], str], user_text: str) -> tuple[str, str]:
    """The chat around a single user message, cut right after `user_text`: (before, after)."""
    text = render([{"role": "user", "content": user_text + _HERE}])
    before, mark, after = text.rpartition(_HERE)
    if not mark:
        raise ValueError("the chat template drops the user's message")
    return before, after


def opened_thought(rendered: str) -> str:
    """ "<think>" where the chat template itself opens the model's thought, else "".

    Such a completion holds only the closing tag, so the opening one is put back before it is read.
    """
    return "<think>" if rendered.rstrip().endswith("<think>") else ""


class Grader:
    """Grades responses with the weights that it is given: the live policy's or frozen ones.

    Args:
      sampler: with buckets for grader prompts (prefix), criteria (branch) and their number (fan-out).
      tokenizer: of the same checkpoint.
      template: a grader template (see `srrl_jax.rubrics.load_template`).
      tries: replies sampled for a criterion before it is unscorable.
      thinking: passed on to the chat template.
    """

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, template: str, *, tries: int = 3, thinking: bool = False
    ):
        self.sampler, self.tokenizer, self.template = sampler, tokenizer, template
        self.tries, self.thinking = tries, thinking

    def grade(
        self,
        params: Any,
        items: Sequence[GradingItem],
        key: jax.Array,
        on_wave: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Verdict]]:
        """One verdict for every criterion of every item.

        Unreadable replies are sampled again, all together, up to `tries` times.

        Args:
          params: `nnx.state` of the grading model.
          key: a typed random key; try t of item i draws from keys folded from (t, i, place
            among the criteria still unread).
          on_wave: told verdicts sampled and their total after each wave of a try.
        Raises:
          InputError: a criterion, or a number of criteria, that the bucket table does not hold.
        """
        encoded = [self.encode(item) for item in items]
        opening = opened_thought(self._render([{"role": "user", "content": ""}]))
        verdicts = [[Verdict(None, "", 0, 0)] * len(item.criteria) for item in items]
        # Text tokenized anew can be longer than what was sampled; what does not fit is unscorable.
        room = self.sampler.buckets.prefix[-1]
        rows = [i for i, (prefix, _) in enumerate(encoded) if len(prefix) <= room]
        for attempt in range(self.tries):
            unread = {i: [c for c, v in enumerate(verdicts[i]) if v.met is None] for i in rows}
            rows = [i for i in rows if unread[i]]
            if not rows:
                break
            replies = self.sampler.generate(
                params,
                [encoded[i][0] for i in rows],
                [[encoded[i][1][c] for c in unread[i]] for i in rows],
                jax.random.fold_in(key, attempt),
                row_ids=rows,
                on_wave=on_wave,
            )
            for i, row in zip(rows, replies, strict=True):
                for c, reply in zip(unread[i], row, strict=True):
                    text = opening + self.tokenizer.decode(reply.tokens.tolist())
                    verdicts[i][c] = Verdict(
                        parse_verdict(text),
                        parse_explanation(text),
                        attempt + 1,
                        verdicts[i][c].tokens + len(reply.tokens),
                    )
        return verdicts

    def encode(self, item: GradingItem) -> tuple[list[int], list[list[int]]]:
        """Token ids of the shared prefix, and of each criterion with what follows it."""
        text = grader_prompt(self.template, item.prompt, item.response)
        before, after = split_chat(self._render, text)
        return self.tokenizer.encode(before), [
            self.tokenizer.encode(self.tokenizer.quote(criterion_prompt(self.template, criterion)) + after)
            for criterion in item.criteria
        ]

    def _render(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.render(messages, thinking=self.thinking)
