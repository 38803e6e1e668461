"""How good a model's answers are, and how good a grader is."""

from srrl_jax.evaluation.agreement import Agreement, agreement, grader_pairs, physician_pairs
from srrl_jax.evaluation.evaluate import Result, evaluate
from srrl_jax.evaluation.judge import Checkpoint, CheckpointJudge, open_judge
from srrl_jax.evaluation.meta import MetaResult, grade_labels, meta_evaluate
from srrl_jax.evaluation.scores import Score, response_scores, summarize

__all__ = [
    "Agreement",
    "Checkpoint",
    "CheckpointJudge",
    "MetaResult",
    "Result",
    "Score",
    "agreement",
    "evaluate",
    "grade_labels",
    "grader_pairs",
    "meta_evaluate",
    "open_judge",
    "physician_pairs",
    "response_scores",
    "summarize",
]
