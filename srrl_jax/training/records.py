"""What a step writes down: its metrics and its samples."""

from collections.abc import Sequence

import numpy as np

from srrl_jax.sampling import Completion
from srrl_jax.training.experience import Graded, Task


def completion_metrics(
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    graded: Sequence[Sequence[Graded]],
    rewards: np.ndarray,
) -> dict[str, float]:
    """Means over a step's completions and verdicts, by the names of the README's table.

    Args:
      rewards: [N, G], NaN where there is none.
    """
    flat = [completion for group in groups for completion in group]
    judged = [
        (criterion, verdict)
        for task, group in zip(tasks, graded, strict=True)
        for g in group
        for criterion, verdict in zip(task.example.rubrics, g.verdicts, strict=True)
    ]
    scored = [(criterion.points, verdict.met) for criterion, verdict in judged if verdict.met is not None]
    negative = [met for points, met in scored if points < 0]
    known = [row[~np.isnan(row)] for row in rewards]
    return {
        "reward/mean": _mean(rewards[~np.isnan(rewards)]),
        "reward/std": _mean([row.std(ddof=1) for row in known if len(row) > 1]),
        "reward/zero_std_groups": _mean([len(row) < 2 or np.ptp(row) == 0 for row in known]),
        "completions/mean_length": _mean([len(c.tokens) for c in flat]),
        "completions/truncated": _mean([c.truncated for c in flat]),
        "grader/unscorable": 1 - len(scored) / len(judged),
        "grader/met_rate": _mean([met for _, met in scored]),
        "grader/met_rate_negative": _mean(negative),
        "grader/tokens_per_verdict": _mean([verdict.tokens for _, verdict in judged]),
    }


def update_metrics(updates: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over a step's updates.

    `logprob_diff/max` is the first's: there the trainer still holds the weights that sampled.
    """
    means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    return means | {"logprob_diff/max": float(updates[0]["logprob_diff/max"])}


def rates(
    groups: Sequence[Sequence[Completion]], graded: Sequence[Sequence[Graded]], times: dict[str, float]
) -> dict[str, float]:
    """New tokens and verdicts a second of the rollout and grading phases."""
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
) -> list[dict]:
    """One `samples.jsonl` row for each completion, with every criterion and its verdict."""
    return [
        {
            "split": split,
            "prompt_id": task.example.prompt_id,
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
                    "verdict": verdict.met,
                    "probability": verdict.probability,
                    "explanation": verdict.explanation,
                    "tries": verdict.tries,
                }
                for criterion, verdict in zip(task.example.rubrics, g.verdicts, strict=True)
            ],
        }
        for i, task in enumerate(tasks)
        for j, g in enumerate(graded[i])
    ]


def _mean(values) -> float:
    """NaN for no values, which the log writes as null."""
    return float(np.mean(values)) if len(values) else float("nan")
