"""Rubric grading by the model itself.

Every response is a prefix (instructions, conversation, response), every criterion a branch of it:
the response is read once, whatever the number of its criteria.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import jax
import numpy as np

from srrl_jax.grading.asking import GradingItem, Question, closing_ids
from srrl_jax.grading.config import JudgeConfig
from srrl_jax.grading.gap import reply_gaps
from srrl_jax.grading.voting import Query, Reply, Verdict, poll, queries
from srrl_jax.models.tokenizer import Tokenizer
from srrl_jax.sampling import Sampler, score

OnWave = Callable[[int, int], None]


class Grader:
    """Grades responses with the weights that it is given: the live policy's or frozen ones.

    Args:
      sampler: with buckets for grader prompts (prefix), criteria (branch) and replies (see `fan_out`).
      tokenizer: of the same checkpoint.
      template: a grader template (see `srrl_jax.rubrics.load_template`).
      verdict: "generate" samples a reply with an explanation and reads it. The other two force the
        reply up to the verdict and write nothing: "constrained" draws true or false from the two, at
        the sampler's temperature; "logits" takes the likelier.
      tries: replies sampled for a criterion before it is unscorable ("generate").
      thinking: passed on to the chat template.
      votes: replies (draws) for each criterion, of which the majority counts; odd.
      together: ask for all criteria of a response in one query.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        template: str,
        *,
        verdict: Literal["generate", "constrained", "logits"] = "generate",
        tries: int = 3,
        thinking: bool = False,
        votes: int = 1,
        together: bool = False,
    ):
        self.sampler, self.tokenizer, self.template = sampler, tokenizer, template
        self.verdict, self.tries, self.votes, self.together = verdict, tries, votes, together
        self.question = Question(tokenizer, template, thinking=thinking, forced=verdict != "generate")

    @classmethod
    def at(cls, config: JudgeConfig, tokenizer: Tokenizer) -> Self:
        """A grader that asks so. It only encodes until it is given a `sampler`, which its prompts may size.

        Raises:
          InputError: the template cannot be read or is none.
        """
        return cls(
            None,
            tokenizer,
            config.read_template(),
            verdict=config.verdict,
            tries=config.tries,
            thinking=config.thinking,
            votes=config.votes,
            together=config.together,
        )

    @staticmethod
    def fan_out(criteria: Sequence[int], verdict: str, votes: int, together: bool) -> tuple[int, ...]:
        """Branches of a response with so many criteria: those of a bucket table, from sizes of criteria."""
        replies = votes if verdict == "generate" else 1
        return (replies,) if together else tuple(replies * count for count in criteria)

    def grade(
        self,
        params: Any,
        items: Sequence[GradingItem],
        key: jax.Array,
        on_wave: OnWave = lambda done, total: None,
    ) -> list[list[Verdict]]:
        """One verdict for every criterion of every item.

        Args:
          params: `nnx.state` of the grading model, or what `Sampler.ready` made of it.
          key: a typed random key. Try t of item i draws from keys folded from (t, i, place among the
            criteria still unread); a constrained verdict from (i, place of the criterion).
          on_wave: told replies finished and their total after each wave.
        Raises:
          InputError: a criterion, or a number of criteria, that the bucket table does not hold.
        """
        prefixes = [self.question.prefix(item) for item in items]
        # Text tokenized anew can be longer than what was sampled; what does not fit is unscorable.
        rows = [i for i, prefix in enumerate(prefixes) if len(prefix) <= self.sampler.buckets.prefix[-1]]
        ask = self._written if self.verdict == "generate" else self._forced
        return ask(params, items, prefixes, rows, key, on_wave)

    def encode(self, item: GradingItem) -> tuple[list[int], list[list[int]]]:
        """Token ids of the shared prefix, and of each criterion (all of them) with what follows it."""
        asked = queries(range(len(item.criteria)), self.together)
        return self.question.prefix(item), [self._branch(item, query) for query in asked]

    def _branch(self, item: GradingItem, query: Sequence[int]) -> list[int]:
        return self.question.branch([item.criteria[c] for c in query])

    def _forced(self, params, items, prefixes, rows, key, on_wave) -> list[list[Verdict]]:
        """The likelier verdict, or `votes` draws, from the probabilities of true and false."""
        branches = [self.encode(items[i])[1] for i in rows]
        scores = score(
            self.sampler, params, [prefixes[i] for i in rows], branches, self.question.candidates, on_wave
        )
        verdicts = [[Verdict(None, "", 0, 0)] * len(item.criteria) for item in items]
        temperature = 0 if self.verdict == "logits" else self.sampler.sampling.temperature
        seed = jax.random.key_data(key).tolist()
        for i, logprobs in zip(rows, scores, strict=True):
            for c, odds in enumerate((logprobs[:, 0] - logprobs[:, 1]).astype(float)):
                draws = np.random.default_rng([*seed, i, c]).random(self.votes)
                met = odds > 0 if temperature == 0 else np.median(draws) < _sigmoid(odds / temperature)
                verdicts[i][c] = Verdict(bool(met), "", 1, 0, float(_sigmoid(odds)))
        return verdicts

    def _written(self, params, items, prefixes, rows, key, on_wave) -> list[list[Verdict]]:
        """Samples replies and reads them; in 8 bits, also measures what these change in some of the first."""
        weights = self.sampler.ready(params)

        def ask(attempt: int, asked: Mapping[int, Sequence[Query]]) -> list[list[Reply]]:
            sampler = self._samplers[min(attempt, 1)]
            given = [prefixes[i] for i in asked]
            branches = [
                [self._branch(items[i], query) for query in row for _ in range(self.votes)]
                for i, row in asked.items()
            ]
            sampled = sampler.generate(
                weights,
                given,
                branches,
                jax.random.fold_in(key, attempt),
                row_ids=list(asked),
                on_wave=on_wave,
            )
            opening, decode = self.question.opening, self.tokenizer.decode
            replies = [
                [Reply(opening + decode(r.tokens.tolist()), len(r.tokens)) for r in row] for row in sampled
            ]
            if sampler.int8_weights and attempt == 0:
                firsts = [row[0] for row in branches], [row[0] for row in sampled]
                for row, gap in zip(
                    replies, reply_gaps(sampler, weights.params, given, *firsts), strict=False
                ):
                    row[0] = row[0]._replace(gap=gap)
            return replies

        criteria = [len(item.criteria) for item in items]
        return poll(criteria, rows, ask, tries=self.tries, votes=self.votes, together=self.together)

    @cached_property
    def _samplers(self) -> tuple[Sampler, Sampler]:
        """Of the first try, which ends at a closing brace, and of the later ones, which do not.

        The engine stops at tokens, so a brace within an explanation stops the first try too. Its reply
        is then an object cut off in a string, which is unscorable and never a wrong verdict, and the
        next try reads on. Without a next one, and where braces are no end (thoughts, lists of objects),
        nothing stops early. Both have equally many stop ids, so that one program serves the two.
        """
        if self.tries == 1 or self.together or self.question.thinking or self.question.opening:
            return self.sampler, self.sampler
        first, later = copy.copy(self.sampler), copy.copy(self.sampler)
        stops = self.sampler.stop_ids
        closing = closing_ids(self.tokenizer)
        first.stop_ids = (*stops, *closing)
        later.stop_ids = (*stops, *stops[:1] * len(closing))
        return first, later


def _sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))
