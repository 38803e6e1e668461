"""The algorithm: the policy answers, grades its own answers by rubric, and learns from the grades.

"Self-Rewarding Rubric-Based Reinforcement Learning for Open-Ended Reasoning" (arXiv 2509.25534), with
GRPO's group baseline, DAPO's clip-higher and token-level loss, and optionally a KL penalty to the
frozen starting weights. `train` reads top to bottom; what surrounds a run (checkpoints, logs, SIGTERM)
is in `session.py`.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import draw_ids, epochs_done, step_rows
from srrl_jax.grading import Judge
from srrl_jax.locking import sole_writer
from srrl_jax.parallel import computing, make_mesh
from srrl_jax.rubrics import Example
from srrl_jax.sampling import Weights
from srrl_jax.training.checkpoint import TrainState
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task, grade, make_actor
from srrl_jax.training.learner import Learner, network
from srrl_jax.training.lessons import with_lessons
from srrl_jax.training.mfu import update_mfu
from srrl_jax.training.monitor import control_items, control_metrics, eval_metrics, open_teacher, other_judges
from srrl_jax.training.own import GraderFunction, Reward, bring, try_out
from srrl_jax.training.records import completion_metrics, rates, sample_rows, update_metrics
from srrl_jax.training.rewards import relative_rewards, training_rewards, without_variance
from srrl_jax.training.run import check_identity, check_processes, check_run, load_tasks, run_programs
from srrl_jax.training.session import OnStep, Session

TRAIN, HELD_OUT = 0, 1  # streams of random keys within a step; resampled groups have those from 2 on


def train(
    config: TrainConfig,
    *,
    reward: Reward | None = None,
    grader: Judge | GraderFunction | None = None,
    rows: Iterable[Example] | None = None,
    callbacks: Sequence[OnStep] = (),
) -> TrainState:
    """Runs a recipe from its start, or from the last checkpoint of its run directory; returns its end.

    >>> import srrl_jax
    >>> def brevity(group):  # the rubric's reward, less a thousandth for each token
    ...     return group.rewards - 0.001 * np.array(group.lengths)
    >>> config = srrl_jax.TrainConfig.load("demo", ["steps=1", "prompts_per_step=2", "group_size=2",
    ...     "optimizer.microbatch=1", "data.eval=null", f"run_dir={run_dir}"])
    >>> state = srrl_jax.train(config, reward=brevity)

    Args:
      reward: of a group (`srrl_jax.training.Group`), one number a response, in place of the rubric's.
      grader: what has `grade` (`srrl_jax.grading.Judge`), or a function (conversation, response, criteria)
        -> verdicts (true, false, or None where it cannot say); it decides the rewards, and grades held-out
        answers beside the policy.
      rows: training rows, in place of those of `data.train`.
      callbacks: each is called with a step, its metrics and its rows of samples.jsonl, on process 0.

    Hashes of `rows`, of the source of `reward` and `grader`, and of the files that results depend on are kept
    in config.yaml.
    Raises:
      InputError: in config, rows, checkpoint or what was handed in, before anything is compiled or written;
        another process trains in `run_dir`;
        later when the disk is full, or after too many updates in a row that were not finite.
      Preempted: after SIGTERM; after SIGINT its subclass `Interrupted`, when the step under way is done.
    """
    own = bring(config, reward, grader, rows)
    config = own.config
    changes = check_run(config)
    tokenizer = load_tokenizer(config.model)
    run_tasks = load_tasks(config, tokenizer, own.rows)
    tasks, lessons, held_out = run_tasks.train, run_tasks.lessons, run_tasks.held_out
    identity = run_tasks.identity | own.identity
    check_processes(config, identity)
    changes += check_identity(config, identity)
    try_out(own, tasks[0].example, config.group_size)
    mesh = make_mesh(config.mesh)

    with (
        computing(mesh, config.dtype, config.matmul_precision),
        open_teacher(config) as teacher,
        sole_writer(f"{config.run_dir}/writer"),
    ):
        model = network(config)
        lengths = run_tasks.lengths(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        learner = Learner(model, config, mesh, lengths.longest_prompt)
        weights = {"weights": learner.fingerprint()}
        changes += check_identity(config, weights)

        with Session(config, changes, identity | weights, callbacks) as session:
            state = session.resume(learner.start())
            session.note_dropped(run_tasks.dropped)
            session.compile_ahead(run_programs(config, actor, learner, state), mesh)

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
                with session.phase(phase) as on_wave:
                    return actor.answer(weights, prompts, samples, key, ids, on_wave)

            def experience(tasks: list[Task], step: int, stream: int) -> tuple[list, list, np.ndarray]:
                rollout_key, grade_key = keys_of(step, stream)
                weights = policy()
                # 1. The policy answers every prompt with a group of completions.
                groups = answer(weights, tasks, config.group_size, rollout_key, "rollout")
                # 2. The same weights (or frozen ones, a teacher, one's own grader) judge all by all criteria.
                grader = judge(config.judge, weights, grade_key)
                longest, keys = config.rollout.max_new_tokens, (config.seed, step)
                with session.phase("grade") as on_wave:
                    graded = grade(grader, tokenizer, tasks, groups, on_wave)
                    rewards = training_rewards(
                        tasks, groups, graded, config.reward, longest, own.reward, keys
                    )
                return groups, graded, rewards

            def evaluate(step: int) -> tuple[dict, list]:
                rollout_key, grade_key = keys_of(step, HELD_OUT)
                weights = policy()
                groups = answer(weights, held_out, config.eval.samples, rollout_key, "eval")
                grader, others = judge("self", weights, grade_key), {}
                with session.phase("eval") as on_wave:
                    graded = grade(grader, tokenizer, held_out, groups, on_wave)
                    controls = control_items(held_out, graded, config.eval.controls)
                    controlled = control_metrics(grader.grade(controls)) if controls else {}
                for name in other_judges(config):
                    grader = judge(name, weights, grade_key)  # from here on nobody needs the policy's
                    with session.phase("eval") as on_wave:
                        others[name] = grade(grader, tokenizer, held_out, groups, on_wave)
                samples = sample_rows("eval", held_out, groups, graded, others=others)
                return eval_metrics(samples) | controlled, samples

            if session.fresh and held_out:
                session.write(0, state, *evaluate(0))

            for step in session.remaining():
                rows = step_rows(len(tasks), config.prompts_per_step, step - 1, config.seed)
                batch_tasks = with_lessons([tasks[row] for row in rows], lessons, config, step - 1)

                groups, graded, rewards = experience(batch_tasks, step, TRAIN)
                made = [*groups], [*graded]
                for attempt in range(config.reward.resample):
                    if not (alike := np.flatnonzero(without_variance(rewards)).tolist()):
                        break
                    again = experience([batch_tasks[i] for i in alike], step, HELD_OUT + 1 + attempt)
                    made = made[0] + again[0], made[1] + again[1]
                    for i, *new in zip(alike, *again, strict=True):
                        groups[i], graded[i], rewards[i] = new
                # 3. Rewards relative to the group; an answer without a reward does not count.
                advantages, scored = relative_rewards(rewards, config.loss, config.reward)
                minibatches = learner.minibatches(batch_tasks, groups, scored, advantages)

                # 4. How likely the frozen reference finds the completions, and, where it is not taken
                #    from the sampler, the policy itself before its updates.
                if learner.scores:
                    with session.phase("logprob"):
                        minibatches = learner.with_logprobs(state.params, minibatches)

                # 5. One AdamW update for each minibatch.
                with session.phase("update"):
                    state, learnt = learner.update(state, minibatches)
                session.note_skipped(step, learnt, minibatches)

                # 6. Write down what happened, and now and then where to go on from.
                samples = sample_rows("train", batch_tasks, groups, graded, advantages)
                metrics = update_metrics(learnt) | completion_metrics(samples, rewards)
                metrics["lr"] = learner.learning_rate(step, session.skips.total)
                metrics["data/epoch"] = epochs_done(len(tasks), config.prompts_per_step, step)
                if held_out and (step % config.eval.every == 0 or step == config.steps):
                    more, held_out_samples = evaluate(step)
                    metrics |= more
                    samples += held_out_samples
                session.times |= rates(*made, session.times)
                session.times |= update_mfu(
                    model.config, batch_tasks, groups, session.times["time/update"], config.lora.rank > 0
                )
                if teacher:
                    session.times["perf/teacher_cost"] = teacher.usage.cost
                session.write(step, state, metrics, samples, groups)
    return state
