"""Rubrics: examples and their criteria, the grader's prompt, its verdicts, and the score.

Pure Python, standard library only; nothing here knows about models or JAX.
"""

from srrl_jax.rubrics.faults import row_faults, text_faults
from srrl_jax.rubrics.prompts import (
    SIMPLE_EVALS_SHA256,
    criteria_prompt,
    criterion_prompt,
    grader_prompt,
    load_template,
    template_sha256,
)
from srrl_jax.rubrics.scoring import group_rewards, score_response
from srrl_jax.rubrics.types import Criterion, Example, Message
from srrl_jax.rubrics.verdicts import parse_explanation, parse_verdict, parse_verdicts, visible_response

__all__ = [
    "SIMPLE_EVALS_SHA256",
    "Criterion",
    "Example",
    "Message",
    "criteria_prompt",
    "criterion_prompt",
    "grader_prompt",
    "group_rewards",
    "load_template",
    "parse_explanation",
    "parse_verdict",
    "parse_verdicts",
    "row_faults",
    "score_response",
    "template_sha256",
    "text_faults",
    "visible_response",
]
