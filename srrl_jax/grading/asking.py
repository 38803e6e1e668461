"""How the grader is asked: the tokens of a response's prompt and of its criteria."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Criterion, Message, criteria_prompt, criterion_prompt, grader_prompt

# What is forced where the verdict alone is asked for, up to true or false.
SKELETON = '{"explanation": "", "criteria_met": '

_HERE = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}criterion\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"


class GradingItem(NamedTuple):
    """A response as a user would see it, its conversation, and the criteria to judge it by."""

    prompt: Sequence[Message]
    response: str
    criteria: Sequence[Criterion]


class GraderPrompt:
    """Encodes the prompts of a grader: a grader template within the chat template, as token ids.

    Args:
      tokenizer: of the grading model.
      template: a grader template (see `srrl_jax.rubrics.load_template`).
      thinking: passed on to the chat template.
      forced: whether the reply is forced up to the verdict; `candidates` are then the tokens that go
        on with true and with false, `replies` those up to the end, `skeleton` the text before them.
    Raises:
      InputError: `forced`, and true and false do not differ in a token.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, *, thinking: bool = False, forced: bool = False):
        self.tokenizer, self.template, self.thinking, self.forced = tokenizer, template, thinking, forced
        self._encode = lru_cache(1 << 16)(tokenizer.encode)  # a criterion is asked of many responses
        if forced:
            yes, no = (tokenizer.encode(self._after + word) for word in ("true}", "false}"))
            same = next((i for i, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1]), None)
            if same is None:
                raise InputError(
                    f"grading.verdict: after {SKELETON!r} this tokenizer has no token that tells true from "
                    "false; use grading.verdict=generate"
                )
            self.candidates = (yes[same], no[same])
            self._tail = len(yes) - same
            self.replies = (tuple(yes[same:]), tuple(no[same:]))
            # A tokenizer may write the end of the skeleton and the verdict as one token.
            self.skeleton = (SKELETON + "true}")[: -len(tokenizer.decode(yes[same:]))]

    def shared(self, prefixes: Iterable[Sequence[int]] = ()) -> tuple[int, ...]:
        """The tokens that the prompts of all items begin with, those of `prefixes` too: the instructions of a
        template that puts them first. None where they are so few that nothing is saved."""
        roles = ("user", "assistant", "system")
        prompts = [self.prefix(GradingItem([{"role": role, "content": ""}], "", ())) for role in roles]
        tokens = list(os.path.commonprefix(prompts))
        for prefix in prefixes:
            tokens = list(os.path.commonprefix([tokens, list(prefix)]))
        return tuple(tokens) if len(tokens) >= 64 else ()

    def prefix(self, item: GradingItem) -> list[int]:
        """What all criteria of the item share: instructions, conversation, response."""
        text = grader_prompt(self.template, item.prompt, item.response)
        return self.tokenizer.encode(split_chat(self._render, text)[0])

    def branch(self, criteria: Sequence[Criterion]) -> list[int]:
        """The criterion, or the list of several, and what follows: all up to where the reply begins."""
        one = len(criteria) == 1
        text = criterion_prompt(self.template, *criteria) if one else criteria_prompt(self.template, criteria)
        text = self.tokenizer.quote(text) + self._after
        return self._encode(text + "true}")[: -self._tail] if self.forced else self._encode(text)

    @cached_property
    def opening(self) -> str:
        """What the chat template has already written of the reply, see `opened_thought`."""
        return opened_thought(self._render([{"role": "user", "content": ""}]))

    @cached_property
    def _after(self) -> str:
        _, after = split_chat(self._render, "")
        closing = "</think>\n\n" if self.opening else ""
        return after + closing + SKELETON if self.forced else after

    def _render(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.render(messages, thinking=self.thinking)


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


@cache
def closing_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end with a closing brace, blanks and code fences aside."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.size))
    return tuple(i for i, text in enumerate(texts) if text.rstrip(" \t\r\n`").endswith("}"))
