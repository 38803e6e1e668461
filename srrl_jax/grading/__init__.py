"""Who judges: the policy at its current weights, or a frozen copy of it."""

from srrl_jax.grading.grader import Grader, GradingItem, Verdict, opened_thought, split_chat

__all__ = ["Grader", "GradingItem", "Verdict", "opened_thought", "split_chat"]
