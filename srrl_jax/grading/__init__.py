"""Who judges: the policy at its current weights, or a frozen copy of it."""

from srrl_jax.grading.asking import GradingItem, opened_thought, split_chat
from srrl_jax.grading.grader import Grader, Verdict

__all__ = ["Grader", "GradingItem", "Verdict", "opened_thought", "split_chat"]
