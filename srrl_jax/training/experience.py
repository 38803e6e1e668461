"""A step's experience: sample groups of completions, then grade them against their rubrics."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from srrl_jax.actor import Actor, OnProgress, encode_prompt, read_completion
from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader, GradingItem, Judge, Verdict
from srrl_jax.models import Qwen3
from srrl_jax.rubrics import Example, parse_verdict, score_response
from srrl_jax.sampling import Completion, RowLengths, Sampler
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.shapes import RunLengths, sampling_budget, with_responses


class Graded(NamedTuple):
    """What the grader made of one completion; `reward` is None where nothing could be scored."""

    text: str
    response: str
    verdicts: list[Verdict]
    reward: float | None


class Task(NamedTuple):
    """An example made ready.

    Attributes:
      prompt: its tokens.
      opening: "<think>" where the chat template opens the thought, see `opened_thought`.
      row: the number of its row, which its random keys are folded from.
      met: of a lesson (`lessons.py`) the teacher's verdict, which the completion is to give.
      reply: and the tokens of that verdict as the grader would write it, with the teacher's explanation.
      asked: lengths of what the grader is asked about an empty response; None of a lesson.
    """

    example: Example
    prompt: list[int]
    opening: str
    row: int
    met: bool | None = None
    reply: tuple[int, ...] = ()
    asked: RowLengths | None = None


def encode_tasks(
    examples: Sequence[Example], source: str, grader: Grader, config: TrainConfig, positions: int
) -> tuple[list[Task], list[str], tuple[int, ...]]:
    """Tokenizes all prompts and criteria, and checks them against the recipe's limits and the model's.

    Args:
      positions: that the model has.
    Returns:
      The tasks, numbered by row; the rows that were dropped, in words; and the tokens that all prompts of the
      grader begin with.
    Raises:
      InputError: rows that are too long, unless `data.too_long` drops them: lists them, the worst first.
    """
    r, g, tokenizer = config.rollout, config.grading, grader.tokenizer
    tasks, excess = [], []
    rows, shared = grader.lengths(GradingItem(e.prompt, "", e.rubrics) for e in examples)
    for row, (example, asked) in enumerate(zip(examples, rows, strict=True)):
        prompt, opening = encode_prompt(tokenizer, example.prompt, r.thinking)
        reply = g.max_new_tokens if g.verdict == "generate" else 1
        wanted = [
            (len(prompt) + r.max_new_tokens, positions, "prompt and completion", "rollout.max_new_tokens"),
            (
                asked.prefix + r.max_new_tokens + max(asked.branches) + reply,
                positions,
                "the grader's prompt with the longest response, criterion and reply",
                "rollout.max_new_tokens or grading.max_new_tokens",
            ),
        ]
        if r.max_prompt_tokens is not None:
            wanted.append((len(prompt), r.max_prompt_tokens, "the prompt", "rollout.max_prompt_tokens"))
        # The model's positions are the limit that no key lifts.
        over = max(wanted, key=lambda each: (each[0] > each[1] == positions, each[0] - each[1]))
        if over[0] > over[1]:
            excess.append((row, example.prompt_id, *over))
        else:
            tasks.append(Task(example, prompt, opening, row, asked=asked))
    if excess and config.data.too_long == "error":
        raise too_long(source, excess)
    return tasks, [_too_long_row(source, *each) for each in excess], shared


def too_long(source: str, excess: Sequence[tuple[int, str, int, int, str, str]]) -> InputError:
    """One refusal for all rows that are over a limit, the worst first, with what would take all of them."""
    worst = sorted(excess, key=lambda each: each[3] - each[2])
    sizes: dict[str, list[tuple[int, int]]] = {}  # with their limits, by key
    for _, _, size, limit, _, key in excess:
        sizes.setdefault(key, []).append((size, limit))
    mend = []
    for key, pairs in sizes.items():
        which = "all of them" if len(sizes) == 1 else f"{len(pairs)} of them"
        size, limit = max(pairs)
        if key == "rollout.max_prompt_tokens":
            mend.append(f"{key}={size} would take {which}")
        else:
            smaller = f"{key} would have to be {size - limit} smaller to take {which}"
            mend.append(f"the model has {limit} positions: {smaller}")
    lines = [_too_long_row(source, *each) for each in worst[:20]]
    lines += [f"and {len(worst) - 20} more"] if len(worst) > 20 else []
    return InputError(
        f"{len(worst)} rows are too long, the worst first:\n  "
        + "\n  ".join(lines)
        + f"\n{'; '.join(mend)}; or leave them out by data.too_long=drop"
    )


def _too_long_row(source: str, row: int, prompt_id: str, size: int, limit: int, what: str, key: str) -> str:
    return f"{source}: row {row + 1} ({prompt_id}): {what} takes {size} tokens, over {limit}"


def samplers(
    model: Qwen3,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    lengths: RunLengths,
    *,
    stop_ids: Sequence[int],
    allowed: int,
    memory: int | None = None,
) -> tuple[Sampler, Sampler]:
    """Of rollouts and of grading, for rows of these lengths.

    Args:
      memory: bytes of a device; of those that are here by default.
    Raises:
      InputError: more positions than the model has, or not one row fits the memory.
    """
    r, g = config.rollout, config.grading
    free = None if r.memory_gb and g.memory_gb else sampling_budget(config, model, mesh, memory)
    common = dict(stop_ids=stop_ids, allowed=allowed, mesh=mesh)
    rollout = Sampler(
        model,
        lengths.rollout,
        together=config.prompts_per_step,
        new_tokens=r.max_new_tokens,
        sampling=r.sampling,
        memory_gb=r.memory_gb or free,
        int8=r.int8,
        **common,
    )
    grading = Sampler(
        model,
        with_responses(lengths.grading, r.max_new_tokens),
        together=config.prompts_per_step * config.group_size,
        shared=lengths.shared,
        new_tokens=g.max_new_tokens,
        sampling=g.sampling,
        memory_gb=g.memory_gb or free,
        int8=g.int8,
        **common,
    )
    return rollout, grading


def make_actor(
    model: Qwen3, tokenizer: Tokenizer, config: TrainConfig, mesh: jax.sharding.Mesh, lengths: RunLengths
) -> Actor:
    """The policy in both its roles, at the recipe's settings, for rows of these lengths."""
    grader = Grader.at(config.grading, tokenizer)
    allowed = min(tokenizer.size, model.config.vocab_size)
    sampler, grader.sampler = samplers(
        model, config, mesh, lengths, stop_ids=tokenizer.stop_ids, allowed=allowed
    )
    return Actor(sampler, grader)


def grade(
    judge: Judge,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    on_progress: OnProgress,
) -> list[list[Graded]]:
    """Every completion against every criterion of its prompt, in one call; then its reward.

    Lessons need no judge: a completion meets the one criterion by giving the teacher's verdict.
    """
    answers = [
        (task, read_completion(tokenizer, task.opening, completion))
        for task, group in zip(tasks, groups, strict=True)
        for completion in group
    ]
    open_ended = [(task.example, answer) for task, answer in answers if task.met is None]
    items = [GradingItem(example.prompt, a.response, example.rubrics) for example, a in open_ended]
    judged = iter(judge.grade(items, on_progress) if items else [])
    flat = []
    for task, answer in answers:
        verdicts = next(judged) if task.met is None else [_agrees(task, answer.completion)]
        reward = score_response(task.example.rubrics, [v.met for v in verdicts])
        flat.append(Graded(answer.completion, answer.response, verdicts, reward))
    each = iter(flat)
    return [[next(each) for _ in group] for group in groups]


def _agrees(lesson: Task, text: str) -> Verdict:
    return Verdict(parse_verdict(lesson.opening + text) is lesson.met, "", 0, 0)
