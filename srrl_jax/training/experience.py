"""A step's experience: sample groups of completions, then grade them against their rubrics."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from srrl_jax.actor import Actor, OnWave, encode_prompt, read_completion
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader, GradingItem, Judge, Verdict
from srrl_jax.models import Qwen3
from srrl_jax.models.tokenizer import Tokenizer
from srrl_jax.parallel import check_rows
from srrl_jax.rubrics import Example, parse_verdict, score_response
from srrl_jax.sampling import Buckets, Completion, Sampler
from srrl_jax.training.config import TrainConfig


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
    """

    example: Example
    prompt: list[int]
    opening: str
    row: int
    met: bool | None = None
    reply: tuple[int, ...] = ()


def encode_tasks(examples: Sequence[Example], source: str, tokenizer: Tokenizer, config: TrainConfig):
    """Tokenizes all prompts, and checks them and their criteria against the bucket table.

    Raises:
      InputError: names the source, the row, the length and the key to enlarge.
    """
    r, g = config.rollout, config.grading
    grader = Grader.at(config.grading, tokenizer)
    tasks = []
    for row, example in enumerate(examples):
        prompt, opening = encode_prompt(tokenizer, example.prompt, r.thinking)
        prefix, branches = grader.encode(GradingItem(example.prompt, "", example.rubrics))
        for key, what, size, sizes in (
            ("rollout.prompt_buckets", "the prompt", len(prompt), r.prompt_buckets),
            (
                "grading.prefix_buckets",
                "the grader prompt with the longest response",
                len(prefix) + r.max_new_tokens,
                g.prefix_buckets,
            ),
            ("grading.criterion_buckets", "a criterion", max(map(len, branches)), g.criterion_buckets),
            ("grading.criteria_buckets", "the list of criteria", len(example.rubrics), g.criteria_buckets),
        ):
            if size > sizes[-1]:
                raise InputError(
                    f"{source}: row {row + 1} ({example.prompt_id}): {what} takes {size}, over the "
                    f"largest of {key} ({sizes[-1]}); enlarge {key} or leave the row out"
                )
        tasks.append(Task(example, prompt, opening, row))
    return tasks


def samplers(
    model: Qwen3,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    *,
    stop_ids: Sequence[int],
    allowed: int,
    trunk: tuple[int, ...] = (),
) -> tuple[Sampler, Sampler]:
    """Of rollouts and of grading; `trunk` is that of the grader's prompts (see `Question.trunk`).

    Raises:
      InputError: rows that the mesh cannot cut, or more positions than the model has.
    """
    r, g = config.rollout, config.grading
    check_rows({"rollout.rows": r.rows, "grading.rows": g.rows}, mesh)
    shared = dict(stop_ids=stop_ids, allowed=allowed, mesh=mesh)
    rollout = Sampler(
        model,
        Buckets(
            r.prompt_buckets, fan_out=tuple(sorted({config.group_size, config.eval.samples})), rows=r.rows
        ),
        new_tokens=r.max_new_tokens,
        sampling=r.sampling,
        memory_gb=r.memory_gb,
        int8=r.int8,
        **shared,
    )
    grading = Sampler(
        model,
        Buckets(
            g.prefix_buckets,
            Grader.fan_out(g.criteria_buckets, g.verdict, g.votes, g.together),
            g.criterion_buckets,
            g.rows,
            trunk,
        ),
        new_tokens=g.max_new_tokens,
        sampling=g.sampling,
        memory_gb=g.memory_gb,
        int8=g.int8,
        **shared,
    )
    return rollout, grading


def make_actor(model: Qwen3, tokenizer: Tokenizer, config: TrainConfig, mesh: jax.sharding.Mesh) -> Actor:
    """The policy in both its roles, at the recipe's settings."""
    grader = Grader.at(config.grading, tokenizer)
    allowed = min(tokenizer.size, model.config.vocab_size)
    sampler, grader.sampler = samplers(
        model, config, mesh, stop_ids=tokenizer.stop_ids, allowed=allowed, trunk=grader.question.trunk
    )
    return Actor(sampler, grader)


def grade(
    judge: Judge,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    on_wave: OnWave,
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
    judged = iter(judge.grade(items, on_wave) if items else [])
    flat = []
    for task, answer in answers:
        verdicts = next(judged) if task.met is None else [_agrees(task, answer.completion)]
        reward = score_response(task.example.rubrics, [v.met for v in verdicts])
        flat.append(Graded(answer.completion, answer.response, verdicts, reward))
    each = iter(flat)
    return [[next(each) for _ in group] for group in groups]


def _agrees(lesson: Task, text: str) -> Verdict:
    return Verdict(parse_verdict(lesson.opening + text) is lesson.met, "", 0, 0)
