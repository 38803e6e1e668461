"""From graded completions to the rewards that a group is compared by."""

from collections.abc import Sequence

import numpy as np

from srrl_jax.losses import group_advantages, overlong_penalty
from srrl_jax.rubrics import group_rewards
from srrl_jax.sampling import Completion
from srrl_jax.training.config import LossConfig, RewardConfig
from srrl_jax.training.experience import Graded, Task
from srrl_jax.training.own import Group, Reward, call_reward, of_main, rubric_reward


def training_rewards(
    tasks: Sequence[Task],
    groups: Sequence[Sequence[Completion]],
    graded: Sequence[Sequence[Graded]],
    config: RewardConfig,
    longest: int,
    reward: Reward = rubric_reward,
    keys: Sequence[int] = (),
) -> np.ndarray:
    """float32 [N, G]; NaN where a completion has no reward, or is truncated and `overlong` is "mask".

    Args:
      longest: limit of a completion, in tokens.
      reward: of one's own, of what is no lesson; process 0 calls it.
      keys: seed and step, from which `criteria_dropout` draws.
    Raises:
      InputError: it does not give one finite number for each response.
    """
    rewards = np.array(
        [
            group_rewards(
                task.example.rubrics,
                _with_dropout(
                    [[v.probability if config.soft else v.met for v in g.verdicts] for g in row],
                    task,
                    config.criteria_dropout,
                    keys,
                ),
                positive_only=config.criteria == "positive",
                drop_unvarying=config.drop_unvarying,
                reweight=config.reweight,
                axis_weights=config.axis_weights,
            )
            for task, row in zip(tasks, graded, strict=True)
        ],
        np.float32,  # None becomes NaN
    )
    lengths = np.array([[len(c.tokens) for c in group] for group in groups])
    cut = np.array([[c.truncated for c in group] for group in groups])
    if reward is not rubric_reward:
        own = [i for i, task in enumerate(tasks) if task.met is None]
        given = [
            Group(
                tasks[i].example,
                [g.response for g in graded[i]],
                [g.verdicts for g in graded[i]],
                lengths[i].tolist(),
                cut[i].tolist(),
                rewards[i].copy(),
            )
            for i in own
        ]
        rewards[own] = of_main(lambda: [call_reward(reward, group) for group in given])
    rewards -= overlong_penalty(lengths, longest, config.overlong_buffer)
    if config.overlong == "mask":
        rewards[cut] = np.nan
    return rewards


def _with_dropout(
    verdicts: list[list], task: Task, share: float, keys: Sequence[int]
) -> list[list[bool | float | None]]:
    """Verdicts of a group without those on a share of the criteria: unread, they do not count.

    Where no criterion with positive points is left, all stay: there would be no reward.
    """
    kept = np.random.default_rng([*keys, task.row]).random(len(task.example.rubrics)) >= share
    if not any(keep and c.points > 0 for keep, c in zip(kept, task.example.rubrics, strict=True)):
        return verdicts
    return [[met if keep else None for met, keep in zip(row, kept, strict=True)] for row in verdicts]


def zero_variance_groups(rewards: np.ndarray) -> np.ndarray:
    """bool [N], true where fewer than two rewards of a group [N, G] are known, or all are the same."""
    known = ~np.isnan(rewards)
    top, bottom = (np.where(known, rewards, end) for end in (-np.inf, np.inf))
    return (known.sum(-1) < 2) | (top.max(-1) == bottom.min(-1))


def compute_advantages(
    rewards: np.ndarray, loss: LossConfig, config: RewardConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages float32 [N, G] of rewards within their groups, and bool [N, G]: whose tokens count."""
    scored = ~np.isnan(rewards)
    advantages = np.asarray(group_advantages(rewards, scored, loss.advantage))
    if config.zero_variance == "drop":
        scored &= ~zero_variance_groups(rewards)[:, None]
    return advantages, scored
