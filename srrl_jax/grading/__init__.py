"""Who judges: the policy at its current weights, a frozen copy of it, or a teacher behind an endpoint."""

from srrl_jax.grading.asking import GradingItem, opened_thought, split_chat
from srrl_jax.grading.config import AskingConfig, JudgeConfig
from srrl_jax.grading.grader import Grader
from srrl_jax.grading.judge import Judge, WeightsJudge
from srrl_jax.grading.teacher import Teacher, TeacherConfig
from srrl_jax.grading.voting import Verdict

__all__ = [
    "AskingConfig",
    "Grader",
    "GradingItem",
    "Judge",
    "JudgeConfig",
    "Teacher",
    "TeacherConfig",
    "Verdict",
    "WeightsJudge",
    "opened_thought",
    "split_chat",
]
