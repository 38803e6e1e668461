"""The embedded tiny world: the desk of a harbour inn, where a program can check every rubric.

Rows have HealthBench's schema, so training treats them like any other rows. The oracle is for
making pretraining labels and for reports after the fact; training never imports it.
"""

from srrl_jax.tinyworld.corpus import (
    draw_quality,
    grader_pairs,
    grader_reply,
    pretraining_tree,
)
from srrl_jax.tinyworld.oracle import evidence, oracle, oracle_score
from srrl_jax.tinyworld.rows import draw_row, dump_rows, easy_rows, hard_rows
from srrl_jax.tinyworld.world import (
    Facts,
    draw_facts,
    facts_of,
    split_of,
    write_prompt,
    write_response,
)

__all__ = [
    "Facts",
    "draw_facts",
    "draw_quality",
    "draw_row",
    "dump_rows",
    "easy_rows",
    "evidence",
    "facts_of",
    "grader_pairs",
    "grader_reply",
    "hard_rows",
    "oracle",
    "oracle_score",
    "pretraining_tree",
    "split_of",
    "write_prompt",
    "write_response",
]
