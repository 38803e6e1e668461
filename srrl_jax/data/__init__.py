"""Rubric rows from files, `datasets` and TFDS: read, checked, selected, and ordered for training."""

from srrl_jax.data.order import draw_ids, epochs_done, step_rows
from srrl_jax.data.select import check_disjoint, select, subtract
from srrl_jax.data.sources import load_examples, read_rows
from srrl_jax.data.tfds import write_tfds

__all__ = [
    "check_disjoint",
    "draw_ids",
    "epochs_done",
    "load_examples",
    "read_rows",
    "select",
    "step_rows",
    "subtract",
    "write_tfds",
]
