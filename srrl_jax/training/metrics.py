"""The metrics of a step, and the rows of samples.jsonl that they are counted from."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from srrl_jax.sampling import Completion
from srrl_jax.telemetry.signs import completion_shares, verdict_shares
from srrl_jax.training.experience import Graded, Task
from srrl_jax.training.rewards import zero_variance_groups


def completion_metrics(rows: Sequence[dict], rewards: np.ndarray) -> dict[str, float]:
    """Means over a step's completions and verdicts, from the rows that `sample_rows` makes.

    Args:
      rewards: [N, G], NaN where there is none.
    """
    lessons = [row["reward"] for row in rows if row["split"] == "lesson"]
    rows = [row for row in rows if row["split"] != "lesson"]
    rewards = rewards[: len(rows) // rewards.shape[1]]  # lessons are the last
    judged = [criterion for row in rows for criterion in row["criteria"]]
    scored = [criterion for criterion in judged if criterion["verdict"] is not None]
    gaps = [criterion["logprob_diff"] for criterion in judged if "logprob_diff" in criterion]
    known = [row[~np.isnan(row)] for row in rewards]
    metrics = {
        "reward/mean": _mean(rewards[~np.isnan(rewards)]),
        "reward/std": _mean([row.std(ddof=1) for row in known if len(row) > 1]),
        "reward/zero_std_groups": _mean(zero_variance_groups(rewards)),
        "completions/mean_length": _mean([row["tokens"] for row in rows]),
        **completion_shares((row["prompt_id"], row["response"], row["truncated"]) for row in rows),
        **verdict_shares(criterion["verdict"] for criterion in judged),
        "grader/met_rate": _mean([criterion["verdict"] for criterion in scored]),
        "grader/met_rate_negative": _mean([c["verdict"] for c in scored if c["points"] < 0]),
        "grader/tokens_per_verdict": _mean([criterion["tokens"] for criterion in judged]),
    }
    if gaps:
        metrics["grader/logprob_diff/mean"] = _mean([gap["mean"] for gap in gaps])
        metrics["grader/logprob_diff/max"] = max(gap["max"] for gap in gaps)
    if lessons:
        metrics["lessons/right"] = _mean(lessons)
    return metrics


def update_metrics(updates: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over a step's updates.

    `logprob_diff/*` are the first's: there the trainer still holds the weights that sampled.
    `guard/skipped_updates` is their number.
    """
    means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    return means | {
        **{name: float(value) for name, value in updates[0].items() if name.startswith("logprob_diff/")},
        "guard/skipped_updates": int(sum(update["guard/skipped_updates"] for update in updates)),
    }


def rates(
    groups: Sequence[Sequence[Completion]], graded: Sequence[Sequence[Graded]], times: Mapping[str, float]
) -> dict[str, float]:
    """New tokens and verdicts a second of the rollout and grading phases.

    Args:
      groups, graded: all that those phases made, of groups that were sampled anew too.
    """
    tokens = sum(len(completion.tokens) for group in groups for completion in group)
    verdicts = sum(len(g.verdicts) for group in graded for g in group)
    return {
        "perf/tokens_per_s": tokens / times["time/rollout"],
        "perf/verdicts_per_s": verdicts / times["time/grade"],
    }


def sample_rows(
    split: str,
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    graded: Sequence[Sequence[Graded]],
    advantages: np.ndarray | None = None,
    others: Mapping[str, Sequence[Sequence[Graded]]] = MappingProxyType({}),
) -> list[dict]:
    """One `samples.jsonl` row for each completion, with every criterion and its verdict.

    `others` are the same completions by other judges, whose verdicts stand under their names and their
    reasons under NAME_explanation.
    """
    return [
        {
            "split": split if task.met is None else "lesson",
            "prompt_id": task.example.prompt_id,
            "example_tags": list(task.example.example_tags),
            "sample": j,
            "prompt": list(task.example.prompt),
            "completion": g.text,
            "response": g.response,
            "reward": g.reward,
            "advantage": None if advantages is None else float(advantages[i, j]),
            "tokens": len(groups[i][j].tokens),
            "truncated": bool(groups[i][j].truncated),
            "criteria": [
                {
                    "criterion": criterion.criterion,
                    "points": criterion.points,
                    "tags": list(criterion.tags),
                    "verdict": verdict.met,
                    "probability": verdict.probability,
                    "explanation": verdict.explanation,
                    "tries": verdict.tries,
                    "tokens": verdict.tokens,
                }
                | verdict.logged
                | ({"logprob_diff": verdict.gap._asdict()} if verdict.gap else {})
                | {name: judged[i][j].verdicts[k].met for name, judged in others.items()}
                | {
                    f"{name}_explanation": judged[i][j].verdicts[k].explanation
                    for name, judged in others.items()
                }
                for k, (criterion, verdict) in enumerate(zip(task.example.rubrics, g.verdicts, strict=True))
            ],
        }
        for i, task in enumerate(tasks)
        for j, g in enumerate(graded[i])
    ]


def _mean(values) -> float:
    """NaN for no values, which the log writes as null."""
    return float(np.mean(values)) if len(values) else float("nan")
