"""The algorithm: the policy answers, grades its own answers by rubric, and learns from the grades.

"Self-Rewarding Rubric-Based Reinforcement Learning for Open-Ended Reasoning" (arXiv 2509.25534), with
GRPO's group baseline, DAPO's clip-higher and token-level loss, and optionally a KL penalty to the
frozen starting weights. `train_loop` reads top to bottom. Whoever calls it (`srrl_jax.run.train`) has checked
the recipe and made the models; checkpoints, logs and signals are the `Session`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import jax
import numpy as np

from srrl_jax.actor import Actor
from srrl_jax.checkpoints.tokenizer import Tokenizer
from srrl_jax.data import draw_ids, epochs_done, step_rows
from srrl_jax.grading import Judge, Teacher
from srrl_jax.sampling import Completion, Weights
from srrl_jax.training.batch import UpdateBatch
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task, grade
from srrl_jax.training.learner import Learner
from srrl_jax.training.lessons import with_lessons
from srrl_jax.training.metrics import completion_metrics, rates, sample_rows, update_metrics
from srrl_jax.training.mfu import update_mfu
from srrl_jax.training.monitor import control_items, control_metrics, eval_metrics, other_judges
from srrl_jax.training.own import Own
from srrl_jax.training.rewards import compute_advantages, training_rewards, zero_variance_groups
from srrl_jax.training.tasks import Tasks
from srrl_jax.training.update import TrainState

TRAIN, HELD_OUT = 0, 1  # streams of random keys within a step; resampled groups have those from 2 on


class Session(Protocol):
    """What the loop needs of the run around it, which `srrl_jax.run.session.Session` is.

    Attributes:
      fresh: whether nothing has been done at all, not even the evaluation before the first step.
      times: seconds and rates of the step under way, by metric; the loop adds to them.
      skipped: updates that were skipped so far because they were not finite.
    """

    fresh: bool
    times: dict[str, float]

    @property
    def skipped(self) -> int: ...

    def remaining(self) -> Iterator[int]:
        """Yields the steps that are still to be done, counted from 1."""
        ...

    def phase(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Times a part of a step; gives a function to call with (done, total)."""
        ...

    def note_skipped(self, step: int, learnt: Sequence[dict], minibatches: Sequence[UpdateBatch]) -> None:
        """Counts the updates of a step that were skipped."""
        ...

    def write(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, float],
        samples: list[dict],
        groups: Sequence[Sequence[Completion]] | None = None,
    ) -> None:
        """Writes down what a step did, and a checkpoint where one is due."""
        ...


def train_loop(
    config: TrainConfig,
    tokenizer: Tokenizer,
    tasks: Tasks,
    actor: Actor,
    learner: Learner,
    state: TrainState,
    session: Session,
    own: Own,
    teacher: Teacher | None = None,
) -> TrainState:
    """Does the remaining steps of a run from `state` on, and returns the state after the last.

    Args:
      tasks: rows to train on, lessons and held-out rows, tokenized.
      actor: answers and grades, with the weights that it is given.
      learner: makes batches and updates; has the frozen weights.
      own: the reward and the grader that the caller of `train` brought.
      teacher: the recipe's, open; None where it has none.
    """
    train_tasks, held_out = tasks.train, tasks.held_out

    def keys_of(step: int, stream: int) -> jax.Array:
        """Random keys of the rollout and of the grading of a step."""
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return jax.random.split(jax.random.fold_in(key, stream))

    def policy() -> Weights:
        """The current weights, in the layout of rollouts."""
        with session.phase("relayout"):
            return actor.prepare(learner.policy(state.params))

    def judge(name: str, weights: Weights, key: jax.Array) -> Judge:
        """The frozen weights take the place of `weights`, which are of no use after that."""
        if name in ("teacher", "own"):
            return teacher if name == "teacher" else own.judge
        if name == "frozen":
            with session.phase("relayout"):
                weights = actor.prepare(learner.frozen, replaces=weights)
        return actor.judge(weights, key)

    def answer(weights: Weights, tasks: list[Task], samples: int, key: jax.Array, phase: str) -> list:
        prompts, ids = [task.prompt for task in tasks], draw_ids([task.row for task in tasks])
        with session.phase(phase) as on_progress:
            return actor.answer(weights, prompts, samples, key, ids, on_progress)

    def experience(tasks: list[Task], step: int, stream: int) -> tuple[list, list, np.ndarray]:
        rollout_key, grade_key = keys_of(step, stream)
        weights = policy()
        # 1. The policy answers every prompt with a group of completions.
        groups = answer(weights, tasks, config.group_size, rollout_key, "rollout")
        # 2. The same weights (or frozen ones, a teacher, one's own grader) judge all by all criteria.
        grader = judge(config.judge, weights, grade_key)
        longest, keys = config.rollout.max_new_tokens, (config.seed, step)
        with session.phase("grade") as on_progress:
            graded = grade(grader, tokenizer, tasks, groups, on_progress)
            rewards = training_rewards(tasks, groups, graded, config.reward, longest, own.reward, keys)
        return groups, graded, rewards

    def evaluate(step: int) -> tuple[dict, list]:
        rollout_key, grade_key = keys_of(step, HELD_OUT)
        weights = policy()
        groups = answer(weights, held_out, config.eval.samples, rollout_key, "eval")
        grader, others = judge("self", weights, grade_key), {}
        with session.phase("eval") as on_progress:
            graded = grade(grader, tokenizer, held_out, groups, on_progress)
            controls = control_items(held_out, graded, config.eval.controls)
            controlled = control_metrics(grader.grade(controls)) if controls else {}
        for name in other_judges(config):
            grader = judge(name, weights, grade_key)  # from here on nobody needs the policy's
            with session.phase("eval") as on_progress:
                others[name] = grade(grader, tokenizer, held_out, groups, on_progress)
        samples = sample_rows("eval", held_out, groups, graded, others=others)
        return eval_metrics(samples) | controlled, samples

    if session.fresh and held_out:
        session.write(0, state, *evaluate(0))

    for step in session.remaining():
        rows = step_rows(len(train_tasks), config.prompts_per_step, step - 1, config.seed)
        batch_tasks = with_lessons([train_tasks[row] for row in rows], tasks.lessons, config, step - 1)

        groups, graded, rewards = experience(batch_tasks, step, TRAIN)
        made = [*groups], [*graded]
        for attempt in range(config.reward.resample):
            if not (alike := np.flatnonzero(zero_variance_groups(rewards)).tolist()):
                break
            again = experience([batch_tasks[i] for i in alike], step, HELD_OUT + 1 + attempt)
            made = made[0] + again[0], made[1] + again[1]
            for i, *new in zip(alike, *again, strict=True):
                groups[i], graded[i], rewards[i] = new
        # 3. Rewards relative to the group; an answer without a reward does not count.
        advantages, scored = compute_advantages(rewards, config.loss, config.reward)
        minibatches = learner.minibatches(batch_tasks, groups, scored, advantages)

        # 4. How likely the frozen reference finds the completions, and, where it is not taken
        #    from the sampler, the policy itself before its updates.
        if learner.needs_logprobs:
            with session.phase("logprob"):
                minibatches = learner.with_logprobs(state.params, minibatches)

        # 5. One AdamW update for each minibatch.
        with session.phase("update"):
            state, learnt = learner.update(state, minibatches)
        session.note_skipped(step, learnt, minibatches)

        # 6. Write down what happened, and now and then where to go on from.
        samples = sample_rows("train", batch_tasks, groups, graded, advantages)
        metrics = update_metrics(learnt) | completion_metrics(samples, rewards)
        metrics["lr"] = learner.learning_rate(step, session.skipped)
        metrics["data/epoch"] = epochs_done(len(train_tasks), config.prompts_per_step, step)
        if held_out and (step % config.eval.every == 0 or step == config.steps):
            more, held_out_samples = evaluate(step)
            metrics |= more
            samples += held_out_samples
        session.times |= rates(*made, session.times)
        session.times |= update_mfu(
            learner.model_config, batch_tasks, groups, session.times["time/update"], config.lora.rank > 0
        )
        if teacher:
            session.times["perf/teacher_cost"] = teacher.usage.cost
        session.write(step, state, metrics, samples, groups)
    return state
