"""Rubric grading by the model itself.

Every response is a prefix (instructions, conversation, response), every criterion a branch of it:
the response is read once, whatever the number of its criteria.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import jax
import numpy as np

from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.grading.asking import GraderPrompt, GradingItem, closing_ids
from srrl_jax.grading.config import JudgeConfig
from srrl_jax.grading.gap import reply_gaps
from srrl_jax.grading.voting import Query, Reply, Verdict, collect_verdicts, queries
from srrl_jax.programs import Program
from srrl_jax.sampling import RowLengths, Sampler

OnProgress = Callable[[int, int], None]


class Grader:
    """Grades responses with the weights that it is given: the live policy's or frozen ones.

    Args:
      sampler: planned for the `lengths` of what is graded.
      tokenizer: of the same checkpoint.
      template: a grader template (see `srrl_jax.rubrics.load_template`).
      verdict: "generate" samples a reply with an explanation and reads it. The other two force the
        reply up to the verdict and write nothing: "constrained" draws true or false from the two, at
        the sampler's temperature; "logits" takes the likelier.
      tries: replies sampled for a criterion before it is unscorable ("generate").
      thinking: passed on to the chat template.
      calibrate: "controls" also asks each criterion with positive points about an empty answer, once for each
        conversation, and takes its log-odds there, where they are above 0, off those of the answer: to be met
        it must be likelier than by nothing. Other criteria, which an empty answer may well meet, lose the
        median of that over their rubric. Without effect on "generate".
      votes: replies (draws) for each criterion, of which the majority counts; odd.
      together: ask for all criteria of a response in one query.

    How likely a `Qwen3` finds it that a response meets a criterion, with its `tokenizer`:

    >>> import jax
    >>> from flax import nnx
    >>> from srrl_jax.grading import Grader, GradingItem, JudgeConfig
    >>> from srrl_jax.rubrics import Criterion
    >>> from srrl_jax.sampling import Sampler
    >>> item = GradingItem([{"role": "user", "content": "hello"}], "hi there", [Criterion("greets back", 5)])
    >>> grader = Grader.at(JudgeConfig(template=template, verdict="logits"), tokenizer)  # or "shared"
    >>> rows, shared = grader.lengths([item])
    >>> grader.sampler = Sampler(model, rows, new_tokens=1, stop_ids=tokenizer.stop_ids, shared=shared)
    >>> ((verdict,),) = grader.grade(nnx.state(model), [item], jax.random.key(0))
    >>> 0 <= verdict.probability <= 1
    True
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
        calibrate: Literal["none", "controls"] = "none",
        votes: int = 1,
        together: bool = False,
    ):
        self.sampler, self.tokenizer, self.template = sampler, tokenizer, template
        self.verdict, self.tries, self.votes, self.together = verdict, tries, votes, together
        self.calibrate = calibrate
        self.grader_prompt = GraderPrompt(
            tokenizer, template, thinking=thinking, forced=verdict != "generate"
        )

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
            calibrate=config.calibrate,
            votes=config.votes,
            together=config.together,
        )

    def lengths(self, items: Iterable[GradingItem]) -> tuple[list[RowLengths], tuple[int, ...]]:
        """What a sampler is planned for: tokens of each response's prompt and of each query about it; and the
        tokens that all prompts begin with."""
        rows, prefixes = [], []
        for item in items:
            prefix, branches = self.encode(item)
            lengths = list(map(len, branches))
            if self.together:  # what is asked again may be of one criterion, which is worded otherwise
                lengths = [
                    max(lengths[0], *(len(self._branch(item, [c])) for c in range(len(item.criteria))))
                ]
            rows.append(RowLengths(len(prefix), lengths * self._copies))
            prefixes.append(prefix)
        return rows, self.grader_prompt.shared(prefixes)

    def grade(
        self,
        params: Any,
        items: Sequence[GradingItem],
        key: jax.Array,
        on_progress: OnProgress = lambda done, total: None,
    ) -> list[list[Verdict]]:
        """One verdict for every criterion of every item.

        Args:
          params: `nnx.state` of the grading model, or what `Sampler.prepare` made of it.
          key: a typed random key. Try t of item i draws from keys folded from (t, i, place among the
            criteria still unread); a constrained verdict from (i, place of the criterion).
          on_progress: told replies finished and their total after each wave.
        Raises:
          InputError: a criterion, or a number of criteria, that the sampler was not planned for.
        """
        encoded = [self.encode(item) for item in items]
        rows = [i for i, row in enumerate(encoded) if self._fits(*row)]
        ask = self._written if self.verdict == "generate" else self._forced
        return ask(params, items, encoded, rows, key, on_progress)

    def _fits(self, prefix: Sequence[int], branches: Sequence[Sequence[int]]) -> bool:
        """False where the response is too long, which is then unscorable: text tokenized anew can be longer
        than what was sampled. Of too many or too long criteria the sampler tells."""
        lengths = list(map(len, branches)) * self._copies
        holds = self.sampler.holds
        return holds(RowLengths(len(prefix), lengths)) or not holds(RowLengths(1, lengths))

    @property
    def _copies(self) -> int:
        """Times that a criterion is asked at once."""
        return self.votes if self.verdict == "generate" else 1

    def programs(self, params: Any) -> Iterator[Program]:
        """What `grade` runs with such weights, or their shapes."""
        stop_ids = self._stop_ids[0] if self.verdict == "generate" else None
        return self.sampler.programs(params, scores=self.verdict != "generate", stop_ids=stop_ids)

    def encode(self, item: GradingItem) -> tuple[list[int], list[list[int]]]:
        """Token ids of the shared prefix, and of each criterion (all of them) with what follows it."""
        asked = queries(range(len(item.criteria)), self.together)
        return self.grader_prompt.prefix(item), [self._branch(item, query) for query in asked]

    def _branch(self, item: GradingItem, query: Sequence[int]) -> list[int]:
        return self.grader_prompt.branch([item.criteria[c] for c in query])

    def _forced(self, params, items, encoded, rows, key, on_progress) -> list[list[Verdict]]:
        """The likelier verdict, or `votes` draws, from the probabilities of true and false."""
        asked = [items[i] for i in rows]
        controls = {_rubric(item): item._replace(response="") for item in asked}
        if self.calibrate == "none":
            controls.clear()
        given = [*(encoded[i] for i in rows), *map(self.encode, controls.values())]
        odds = self._log_odds(params, given, on_progress)
        biases = dict(zip(controls, map(_bias, controls.values(), odds[len(rows) :]), strict=True))
        odds = odds[: len(rows)]
        if controls:  # rounded, since an answer that is empty itself differs from its control by rounding
            odds = [(row - biases[_rubric(i)]).round(4) for i, row in zip(asked, odds, strict=True)]
        verdicts = [[Verdict(None, "", 0, 0)] * len(item.criteria) for item in items]
        temperature = 0 if self.verdict == "logits" else self.sampler.sampling.temperature
        seed = jax.random.key_data(key).tolist()
        for i, row in zip(rows, odds, strict=True):
            for c, odd in enumerate(row):
                draws = np.random.default_rng([*seed, i, c]).random(self.votes)
                votes = (draws < _sigmoid(odd / temperature)).tolist() if temperature else [bool(odd > 0)]
                met = 2 * sum(votes) > len(votes)
                verdicts[i][c] = Verdict(met, "", 1, 0, float(_sigmoid(odd)), votes=votes)
        return verdicts

    def _log_odds(self, params, encoded, on_progress) -> list[np.ndarray]:
        """Of true against false, float64 [criteria] for each item that was encoded."""
        prefixes, branches = zip(*encoded, strict=True) if encoded else ((), ())
        scores = self.sampler.score(params, prefixes, branches, self.grader_prompt.candidates, on_progress)
        return [(row[:, 0] - row[:, 1]).astype(float) for row in scores]

    def _written(self, params, items, encoded, rows, key, on_progress) -> list[list[Verdict]]:
        """Samples replies and reads them; in 8 bits, also measures what these change in some of the first."""
        sampler, weights = self.sampler, self.sampler.prepare(params)

        def ask(attempt: int, asked: Mapping[int, Sequence[Query]]) -> list[list[Reply]]:
            given = [encoded[i][0] for i in asked]
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
                on_progress=on_progress,
                stop_ids=self._stop_ids[min(attempt, 1)],
            )
            opening, decode = self.grader_prompt.opening, self.tokenizer.decode
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
        return collect_verdicts(
            criteria, rows, ask, tries=self.tries, votes=self.votes, together=self.together
        )

    @cached_property
    def _stop_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the first try, which ends at a closing brace, and of the later ones, which do not.

        The engine stops at tokens, so a brace within an explanation stops the first try too. Its reply
        is then an object cut off in a string, which is unscorable and never a wrong verdict, and the
        next try reads on. Without a next one, and where braces are no end (thoughts, lists of objects),
        nothing stops early. Both have equally many stop ids, so that one program serves the two.
        """
        stops = self.sampler.stop_ids
        if self.tries == 1 or self.together or self.grader_prompt.thinking or self.grader_prompt.opening:
            return stops, stops
        closing = closing_ids(self.tokenizer)
        return (*stops, *closing), (*stops, *stops[:1] * len(closing))


def _rubric(item: GradingItem) -> str:
    """What an empty answer to the conversation is graded by."""
    return repr((item.prompt, item.criteria))


def _bias(item: GradingItem, odds: np.ndarray) -> np.ndarray:
    """What to take off the log-odds of the criteria, from those on an empty answer; see `Grader`."""
    positive = np.array([criterion.points > 0 for criterion in item.criteria])
    above = np.maximum(odds, 0.0)
    return np.where(positive, above, np.median(above[positive]) if positive.any() else 0.0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))
