"""Rubric rows from files, `datasets` and TFDS, and the order in which training sees them."""

from srrl_jax.data.order import epochs_done, step_rows
from srrl_jax.data.sources import check_disjoint, load_examples
from srrl_jax.data.tfds import write_tfds

__all__ = ["check_disjoint", "epochs_done", "load_examples", "step_rows", "write_tfds"]
