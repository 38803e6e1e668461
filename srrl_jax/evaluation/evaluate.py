"""The score of a model on rows of HealthBench's kind: answers, verdicts, means."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from srrl_jax.actor import Answer
from srrl_jax.errors import InputError
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint, check_items
from srrl_jax.evaluation.samples import append_lines, check_rows, open_lines, write_results
from srrl_jax.evaluation.scores import (
    ADJUSTED,
    LENGTH_PENALTY,
    OVERALL,
    Score,
    length_adjusted,
    response_scores,
    summarize,
)
from srrl_jax.grading import GradingItem, Judge, Verdict
from srrl_jax.rubrics import Example, score_response, text_faults, visible_response
from srrl_jax.telemetry import iter_jsonl


class Answers(NamedTuple):
    """Who answers, and how.

    Attributes:
      answer: gives one answer for each pair of an example and the number of its repeat.
      longest: tokens that an answer may have; 0 where they are there already.
      check: refuses examples that it cannot answer.
    """

    name: str
    settings: dict[str, Any]
    answer: Callable[[Sequence[Example], Sequence[int]], list[Answer]]
    longest: int = 0
    check: Callable[[Sequence[Example]], None] = lambda examples: None


class Result(NamedTuple):
    """An evaluation.

    Attributes:
      scores: by "overall", "overall_length_adjusted", "theme:...", "axis:..." and every other tag.
      repeats: the overall mean of each repeat alone.
      responses: how many were graded.
      left_out: responses none of whose positive criteria got a verdict; they are in no mean.
      unscorable: share of verdicts that could not be read.
    """

    scores: dict[str, Score]
    repeats: list[float]
    responses: int
    left_out: int
    unscorable: float


def answers_of(checkpoint: Checkpoint, config: AnswerConfig, settings: dict[str, Any], seed: int) -> Answers:
    """A checkpoint answers: the same text for the same row, repeat and seed, in whatever order."""

    def answer(examples: Sequence[Example], repeats: Sequence[int]) -> list[Answer]:
        ids = [_id(example.prompt_id, repeat) for example, repeat in zip(examples, repeats, strict=True)]
        return checkpoint.answer([e.prompt for e in examples], ids, jax.random.key(seed), config)

    def check(examples: Sequence[Example]) -> None:
        checkpoint.check_prompts([(e.prompt_id, e.prompt) for e in examples], config)

    return Answers(checkpoint.name, settings, answer, config.max_new_tokens, check)


def ready_answers(name: str, path: str | Path, examples: Sequence[Example], repeats: int) -> Answers:
    """Completions from a file of lines {"prompt_id", "completion"}; more of one prompt are repeats.

    What a user would see is graded: the text after `</think>`. Raises InputError for a line without
    the two, and when a row has fewer completions than `repeats`.
    """
    found = defaultdict(list)
    for number, line in enumerate(iter_jsonl(path), start=1):
        if faults := [*text_faults(line, "prompt_id"), *text_faults(line, "completion")]:
            raise InputError(f"{path}: object {number}: {faults[0]}")
        found[line["prompt_id"]].append(line["completion"])
    short = [e.prompt_id for e in examples if len(found[e.prompt_id]) < repeats]
    if short:
        raise InputError(
            f"{path} has fewer than {repeats} completions for {len(short)} of {len(examples)} rows, first "
            f"{short[0]}: add them, or choose rows with --where and --limit"
        )
    if unused := sum(map(len, found.values())) - repeats * len(examples):
        print(
            f"srrl: {unused} completions of {path} are not used: they are of other rows, or more than "
            f"{repeats} of one (--repeats)",
            file=sys.stderr,
        )

    def answer(examples: Sequence[Example], repeats: Sequence[int]) -> list[Answer]:
        texts = [found[e.prompt_id][repeat] for e, repeat in zip(examples, repeats, strict=True)]
        return [Answer(text, visible_response(text), 0, False) for text in texts]

    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Answers(name, {"completions": str(path), "completions_sha256": digest}, answer)


def check_lengths(answers: Answers, judges: Sequence[Judge], pairs: Sequence[tuple[Example, int]]) -> None:
    """Refuses rows that are too long for who answers or judges. Raises InputError that lists them."""
    answers.check([example for example, _ in pairs])
    texts = [""] * len(pairs) if answers.longest else [a.response for a in answers.answer(*_apart(pairs))]
    items = [
        (example.prompt_id, GradingItem(example.prompt, text, example.rubrics))
        for (example, _), text in zip(pairs, texts, strict=True)
    ]
    for judge in judges:
        check_items(judge, items, answers.longest)


def evaluate(
    examples: Sequence[Example],
    answers: Answers,
    judge: Judge,
    out: str | Path,
    *,
    settings: dict[str, Any],
    repeats: int = 1,
    chunk: int = 32,
    length_penalty: float = LENGTH_PENALTY,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Answers and grades every row `repeats` times and scores what came out.

    Writes `out/samples.jsonl` as it goes, `chunk` responses at a time, and `out/results.json`. What
    an earlier call with the same settings left there is not done again.

    Args:
      settings: what else decides the samples (rows, grader); kept in `out/settings.json`.
      length_penalty: of `length_adjusted`.
      on_progress: told responses done and their total.
    Raises:
      InputError: rows that are too long for who answers or judges, before anything is computed.
    """
    settings = {"model": answers.name, "grader": judge.name} | answers.settings | settings
    path = Path(out) / "samples.jsonl"
    lines = open_lines(path, path.with_name("settings.json"), settings)
    done = {(line["prompt_id"], line["sample"]): line for line in lines}
    wanted = [(example, repeat) for repeat in range(repeats) for example in examples]
    todo = [pair for pair in wanted if (pair[0].prompt_id, pair[1]) not in done]
    check_rows(
        path,
        (
            (
                example.prompt_id,
                [line["prompt"], [[c["criterion"], c["points"]] for c in line["criteria"]]],
                [list(example.prompt), [[c.criterion, c.points] for c in example.rubrics]],
            )
            for example, repeat in wanted
            if (line := done.get((example.prompt_id, repeat)))
        ),
    )
    check_lengths(answers, [judge], todo)
    for part in _chunks(todo, chunk):
        on_progress(len(done), len(wanted))
        replies = answers.answer(*_apart(part))
        verdicts = judge.grade(
            [GradingItem(e.prompt, a.response, e.rubrics) for (e, _), a in zip(part, replies, strict=True)]
        )
        lines = [_sample(*pair, reply, row) for pair, reply, row in zip(part, replies, verdicts, strict=True)]
        append_lines(path, lines)
        done |= {(line["prompt_id"], line["sample"]): line for line in lines}
    on_progress(len(wanted), len(wanted))
    samples = [done[example.prompt_id, repeat] for example, repeat in wanted]
    result = score_samples([example for example, _ in wanted], samples, length_penalty)
    write_results(out, settings | {"length_penalty": length_penalty} | _plain(result))
    return result


def score_samples(
    examples: Sequence[Example], samples: Sequence[dict[str, Any]], length_penalty: float = LENGTH_PENALTY
) -> Result:
    """Scores lines of `samples.jsonl`, each with the row that it answers."""
    verdicts = [[item["verdict"] for item in sample["criteria"]] for sample in samples]
    scores = [
        response_scores(example.rubrics, example.example_tags, row)
        for example, row in zip(examples, verdicts, strict=True)
    ]
    by_repeat = defaultdict(list)
    for sample, score in zip(samples, scores, strict=True):
        if score:
            score[ADJUSTED] = length_adjusted(score[OVERALL], sample["response"], length_penalty)
        by_repeat[sample["sample"]].append(score)
    flat = [met for row in verdicts for met in row]
    each = [summarize(part).get(OVERALL) for _, part in sorted(by_repeat.items())]
    return Result(
        summarize(scores),
        [score.mean for score in each if score is not None],
        len(samples),
        sum(not score for score in scores),
        flat.count(None) / len(flat),
    )


def _sample(example: Example, repeat: int, answer: Answer, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "prompt_id": example.prompt_id,
        "sample": repeat,
        "prompt": list(example.prompt),
        "completion": answer.completion,
        "response": answer.response,
        "reward": score_response(example.rubrics, [verdict.met for verdict in verdicts]),
        "tokens": answer.tokens,
        "truncated": answer.truncated,
        "criteria": [
            {
                "criterion": item.criterion,
                "points": item.points,
                "verdict": verdict.met,
                "explanation": verdict.explanation,
                "tries": verdict.tries,
            }
            | verdict.logged
            for item, verdict in zip(example.rubrics, verdicts, strict=True)
        ],
    }


def _apart(pairs: Sequence[tuple[Example, int]]) -> tuple[list[Example], list[int]]:
    return [example for example, _ in pairs], [repeat for _, repeat in pairs]


def _plain(result: Result) -> dict[str, Any]:
    scores = {name: score._asdict() for name, score in result.scores.items()}
    return result._asdict() | {"scores": scores}


def _id(prompt_id: str, repeat: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{repeat} {prompt_id}".encode()).digest()[:4], "big")


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))
