"""A step of a finished run, computed again from what the run wrote down."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from srrl_jax import storage
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import epochs_done, step_rows
from srrl_jax.errors import InputError
from srrl_jax.grading import Verdict
from srrl_jax.parallel import computing, make_mesh
from srrl_jax.rubrics import Criterion, Example, score_response
from srrl_jax.run.checkpoint import Checkpoints
from srrl_jax.run.tokens import read_tokens, tokens_path
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Graded
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.lessons import with_lessons
from srrl_jax.training.metrics import completion_metrics, update_metrics
from srrl_jax.training.monitor import eval_metrics
from srrl_jax.training.own import Reward, bring
from srrl_jax.training.rewards import compute_advantages, training_rewards
from srrl_jax.training.tasks import load_tasks

_ROUNDING = 1e-4  # relative, and absolute: for values of the update on another machine


class Comparison(NamedTuple):
    """One value of a step: as the run logged it, and as computed again."""

    name: str
    logged: Any
    replayed: Any

    @property
    def verdict(self) -> str:
        """ "same" to the bit, "rounding", or "DIFFERS"."""
        if self.logged == self.replayed:
            return "same"
        numbers = [value for value in (self.logged, self.replayed) if isinstance(value, float | int)]
        close = len(numbers) == 2 and math.isclose(*numbers, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
        return "rounding" if close else "DIFFERS"


def replay(
    run_dir: str, step: int, *, reward: Reward | None = None, rows: Iterable[Example] | None = None
) -> tuple[list[Comparison], int]:
    """Computes a training step again: rows, texts, rewards, advantages, means, and the updates.

    Rewards come from the verdicts in samples.jsonl. The updates start at the newest checkpoint before
    `step`, or else at the starting weights, and go through the tokens of all steps in between.

    Args:
      reward, rows: those that `train` was handed; a reward of the recipe is imported.
    Returns:
      Every value compared (a list of samples that agree is one of them), and the step started from.
    Raises:
      InputError: no such run or step, or a file of it is missing.
    """
    run_dir = storage.locate(run_dir)
    config = _config(run_dir)
    own = bring(dataclasses.replace(config, grader="policy"), reward, rows=rows)
    known = storage.read_yaml(run_dir / "config.yaml").get("identity", {})
    if own.identity.get("reward") != known.get("reward"):
        raise _other(run_dir, "reward")
    if config.data.train == "rows" and rows is None:
        raise _other(run_dir, "rows")
    metrics = {row["step"]: row for row in iter_jsonl(run_dir / "metrics.jsonl")}
    if step < 1 or step not in metrics:
        last = max(metrics, default=0)
        raise InputError(f"{run_dir}: there is no training step {step}; the last one is {last}")
    logged = metrics[step]
    tokenizer = load_tokenizer(config.model)
    run_tasks = load_tasks(config, tokenizer, own.rows)
    tasks, lessons, identity = run_tasks.train, run_tasks.lessons, run_tasks.identity
    if identity["rows"] != known.get("rows", identity["rows"]):
        raise _other(run_dir, "rows")
    mesh = make_mesh(config.mesh)

    with (
        computing(mesh, config.dtype, config.matmul_precision),
        Checkpoints(run_dir, config.checkpoint, read_only=True) as checkpoints,
    ):
        learner = Learner(build_model(config), config, mesh, run_tasks.lengths(config).longest_prompt)
        state = learner.init_state()
        start = max((done for done in checkpoints.steps() if done < step), default=0)
        if start:
            _, state = checkpoints.restore(start, like=state)
        samples = _samples(run_dir, range(start + 1, step + 1))
        for current in range(start + 1, step + 1):
            rows = samples["train", current] + samples.get(("lesson", current), [])
            drawn = step_rows(len(tasks), config.prompts_per_step, current - 1, config.seed)
            batch_tasks = with_lessons([tasks[row] for row in drawn], lessons, config, current - 1)
            groups = read_tokens(tokens_path(run_dir, current), [row["truncated"] for row in rows])
            graded = _graded(rows, config.group_size)
            rewards = training_rewards(
                batch_tasks,
                groups,
                graded,
                config.reward,
                config.rollout.max_new_tokens,
                own.reward,
                (config.seed, current),
            )
            advantages, scored = compute_advantages(rewards, config.loss, config.reward)
            minibatches = learner.minibatches(batch_tasks, groups, scored, advantages)
            if learner.needs_logprobs:
                minibatches = learner.with_logprobs(state.params, minibatches)
            state, learnt = learner.update(state, minibatches)

    flat = [completion for group in groups for completion in group]
    held_out = samples.get(("eval", step))
    values = completion_metrics(rows, rewards) | update_metrics(learnt)
    values["data/epoch"] = epochs_done(len(tasks), config.prompts_per_step, step)
    if held_out:
        values |= eval_metrics(held_out)
    found = [
        *_each("prompt", rows, "prompt_id", [t.example.prompt_id for t in batch_tasks for _ in groups[0]]),
        *_each("completion", rows, "completion", [tokenizer.decode(c.tokens.tolist()) for c in flat]),
        *_each("reward", rows, "reward", [g.reward for group in graded for g in group]),
        *_each("advantage", rows, "advantage", [float(a) for a in advantages.flat]),
    ]
    for name, value in values.items():
        value = value if math.isfinite(value) else None  # as the log writes it
        found.append(Comparison(name, logged.get(name), value))
    return found, start


def _other(run_dir: epath.Path, name: str) -> InputError:
    return InputError(
        f"{run_dir}: it was trained with another {name}; give replay the same, by "
        f"srrl_jax.run.replay.replay(run_dir, step, {name}=...)"
    )


def _config(run_dir: epath.Path) -> TrainConfig:
    path = run_dir / "config.yaml"
    if not path.exists():
        raise InputError(f"{run_dir}: no config.yaml there; give the directory of a run")
    return TrainConfig.from_dict(storage.read_yaml(path), where=str(path))


def _samples(run_dir: epath.Path, steps: range) -> dict[tuple[str, int], list[dict]]:
    """Rows of samples.jsonl by split and step."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in iter_jsonl(run_dir / "samples.jsonl"):  # may be larger than memory
        if row["step"] in steps:
            found.setdefault((row["split"], row["step"]), []).append(row)
    for step in steps:
        tokens = tokens_path(run_dir, step)
        if ("train", step) not in found or not tokens.exists():
            raise InputError(
                f"{run_dir}: step {step} cannot be computed again without its samples and {tokens}"
            )
    return found


def _graded(rows: Sequence[Mapping[str, Any]], group: int) -> list[list[Graded]]:
    """Groups of so many rows as they were graded, their rewards computed from the verdicts again."""
    flat = []
    for row in rows:
        criteria = [Criterion(c["criterion"], c["points"]) for c in row["criteria"]]
        verdicts = [
            Verdict(c["verdict"], c["explanation"], c["tries"], c["tokens"], c["probability"])
            for c in row["criteria"]
        ]
        reward = score_response(criteria, [verdict.met for verdict in verdicts])
        flat.append(Graded(row["completion"], row["response"], verdicts, reward))
    return [flat[i : i + group] for i in range(0, len(flat), group)]


def _each(name: str, rows: Sequence[Mapping], field: str, replayed: Sequence[Any]) -> list[Comparison]:
    """One comparison for all rows where they agree to the bit, else one for each that does not."""
    differing = [
        Comparison(f"{name} {i // (1 + max(r['sample'] for r in rows))}.{row['sample']}", row[field], value)
        for i, (row, value) in enumerate(zip(rows, replayed, strict=True))
        if row[field] != value
    ]
    return differing or [Comparison(f"{name}s", f"{len(rows)} values", f"{len(rows)} values")]
