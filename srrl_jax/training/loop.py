"""The algorithm: the policy answers, grades its own answers by rubric, and learns from the grades.

"Self-Rewarding Rubric-Based Reinforcement Learning for Open-Ended Reasoning" (arXiv 2509.25534), with
GRPO's group baseline, DAPO's clip-higher and token-level loss, and optionally a KL penalty to the
frozen starting weights. `train` reads top to bottom.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srrl_jax.data import step_rows
from srrl_jax.errors import InputError
from srrl_jax.losses import group_advantages
from srrl_jax.models import Qwen3
from srrl_jax.models.attention import check_kernel
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.models.weights import abstract, read_config
from srrl_jax.parallel import make_mesh, place_batch, row_shards
from srrl_jax.telemetry import LiveTable, RunLog
from srrl_jax.training.batch import pack_groups, split_batch
from srrl_jax.training.checkpoint import Checkpoints, TrainState
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import SelfRewarder, rewards_of
from srrl_jax.training.records import completion_metrics, rates, sample_rows, update_metrics
from srrl_jax.training.rewards import training_rewards, without_variance
from srrl_jax.training.run import load_tasks, open_run
from srrl_jax.training.update import completion_logprobs, make_optimizer, make_schedule, make_update


def train(config: TrainConfig) -> TrainState:
    """Runs a recipe from its start, or from the last checkpoint of its run directory; returns its end.

    Raises:
      InputError: in config, rows or checkpoint; before anything is compiled.
    """
    open_run(config)
    tokenizer = load_tokenizer(config.model)
    tasks, held_out = load_tasks(config, tokenizer)
    mesh = make_mesh(config.mesh)
    cut = row_shards(mesh)
    if config.optimizer.microbatch % cut:
        raise InputError(f"optimizer.microbatch must be a multiple of mesh data x fsdp x expert = {cut}")
    schedule, optimizer = make_schedule(config.optimizer), make_optimizer(config.optimizer)
    temperature = config.rollout.sampling.temperature

    with jax.set_mesh(mesh), Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        model = abstract(read_config(config.model), config.dtype)
        check_kernel(config.attention, config.dtype, slides=model.config.windows is not None)
        model.attention = config.attention
        rewarder = SelfRewarder(model, tokenizer, config, mesh)
        graphdef = nnx.graphdef(model)
        params = nnx.state(Qwen3.from_pretrained(config.model, mesh=mesh))  # float32 master weights
        update = make_update(graphdef, config, optimizer)
        # The starting weights: the reference of the KL penalty, and the frozen grader.
        needs_frozen = config.kl_coef > 0 or config.grader == "frozen"
        frozen = jax.tree.map(jnp.copy, params) if needs_frozen else None
        state = TrainState(params, optimizer.init(params))
        del model, params

        log, done = RunLog(config.run_dir), checkpoints.latest()
        log.rewind(-1 if done is None else done)
        if done is not None:
            state = checkpoints.restore(done, like=state)

        with LiveTable(config.steps, start=done or 0) as live:
            times: dict[str, float] = {}

            @contextmanager
            def phase(name: str) -> Iterator:
                start = time.perf_counter()
                with live.phase(name):
                    yield lambda finished, total: live.note(f"{finished}/{total}")
                times[f"time/{name}"] = time.perf_counter() - start

            def keys_of(step: int, held_out: bool) -> jax.Array:
                """Random keys of the rollout and of the grading of a step."""
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                return jax.random.split(jax.random.fold_in(key, held_out))

            def judge():
                return state.params if config.grader == "policy" else frozen

            def evaluate(step: int) -> tuple[dict, list]:
                rollout_key, grade_key = keys_of(step, held_out=True)
                with phase("eval") as on_wave:
                    groups = rewarder.rollout(
                        state.params, held_out, config.eval.samples, rollout_key, on_wave
                    )
                    graded = rewarder.grade(judge(), held_out, groups, grade_key, on_wave)
                score = completion_metrics(held_out, groups, graded, rewards_of(graded))["reward/mean"]
                return {"eval/self": score}, sample_rows("eval", held_out, groups, graded)

            if done is None and held_out:
                metrics, samples = evaluate(0)
                log.write(0, metrics | times, samples)
                live.update(0, metrics | times)
                times.clear()

            for step in range((done or 0) + 1, config.steps + 1):
                rollout_key, grade_key = keys_of(step, held_out=False)
                rows = step_rows(len(tasks), config.prompts_per_step, step - 1, config.seed)
                batch_tasks = [tasks[row] for row in rows]

                # 1. The policy answers every prompt with a group of completions.
                with phase("rollout") as on_wave:
                    groups = rewarder.rollout(
                        state.params, batch_tasks, config.group_size, rollout_key, on_wave
                    )

                # 2. The same weights (or the frozen ones) judge every answer by every criterion.
                with phase("grade") as on_wave:
                    graded = rewarder.grade(judge(), batch_tasks, groups, grade_key, on_wave)

                # 3. Rewards relative to the group; an answer without a reward does not count.
                rewards = training_rewards(
                    batch_tasks, groups, graded, config.reward, config.rollout.max_new_tokens
                )
                scored = ~np.isnan(rewards)
                advantages = np.asarray(group_advantages(rewards, scored, config.loss.advantage))
                if config.reward.zero_variance == "drop":
                    scored &= ~without_variance(rewards)[:, None]
                batch = pack_groups(
                    [task.prompt for task in batch_tasks],
                    groups,
                    scored,
                    config.rollout.prompt_buckets,
                    config.rollout.completion_buckets,
                )._replace(advantages=advantages)
                minibatches = [
                    place_batch(part, mesh, row_axis=1)
                    for part in split_batch(batch, config.optimizer.minibatches, config.optimizer.microbatch)
                ]

                # 4. How likely the frozen reference finds the completions, and, where it is not taken
                #    from the sampler, the policy itself before its updates.
                scorers = {}
                if config.kl_coef > 0:
                    scorers["reference_logprobs"] = frozen
                if config.loss.importance_cap is not None:
                    scorers["old_logprobs"] = state.params
                if scorers:
                    with phase("logprob"):
                        for i, part in enumerate(minibatches):
                            found = {
                                name: completion_logprobs(graphdef, params, part, temperature)
                                for name, params in scorers.items()
                            }
                            minibatches[i] = part._replace(**jax.block_until_ready(found))

                # 5. One AdamW update for each minibatch.
                with phase("update"):
                    learnt = []
                    for part in minibatches:
                        *new, numbers = update(*state, part)
                        state = TrainState(*new)
                        learnt.append(numbers)
                    metrics = update_metrics(jax.device_get(learnt))

                metrics |= completion_metrics(batch_tasks, groups, graded, rewards) | rates(
                    groups, graded, times
                )
                metrics["lr"] = float(schedule(step * config.optimizer.minibatches - 1))
                samples = sample_rows("train", batch_tasks, groups, graded, advantages)
                last = step == config.steps
                if held_out and (step % config.eval.every == 0 or last):
                    more, held_out_samples = evaluate(step)
                    metrics |= more
                    samples += held_out_samples

                # 6. Write down what happened, then where to go on from.
                log.write(step, metrics | times, samples)
                live.update(step, metrics | times)
                times.clear()  # so the next line tells how long this checkpoint took
                if step % config.checkpoint.every == 0 or last:
                    with phase("checkpoint"):
                        position = {"step": step, "seed": config.seed, "row": step * config.prompts_per_step}
                        checkpoints.save(step, state, position)
    return state
