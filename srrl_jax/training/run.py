"""What a run needs before anything expensive starts: its directory and its rows."""

import yaml

from srrl_jax import storage
from srrl_jax.data import check_disjoint, load_examples, select, subtract
from srrl_jax.errors import InputError
from srrl_jax.models.tokenizer import Tokenizer
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.experience import Task, encode_tasks

# Keys that may differ when a run resumes: they do not change what any step computes.
_MAY_CHANGE = ("run_dir", "steps", "checkpoint")


def open_run(config: TrainConfig) -> None:
    """Makes the run directory with the resolved config; an existing run must be of the same recipe.

    Raises:
      InputError: the directory cannot be written, or it holds a run of another recipe (the message
        shows the keys that differ).
    """
    run_dir = storage.locate(config.run_dir)
    path = run_dir / "config.yaml"
    new = config.to_dict()
    checkpoints = run_dir / "checkpoints"
    if path.exists() and checkpoints.is_dir() and any(step.name.isdigit() for step in checkpoints.iterdir()):
        old = yaml.safe_load(path.read_text())
        differences = [
            f"{key} was {before!r}, now {after!r}"
            for key, before, after in _differences(old, new)
            if key.split(".")[0] not in _MAY_CHANGE
        ]
        if differences:
            raise InputError(
                f"{run_dir} holds a run of another recipe: {'; '.join(differences)}. "
                "Resume with the same values, or give another run_dir"
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        storage.replace(path, [yaml.safe_dump(new, sort_keys=False).encode()])
    except OSError as error:
        raise InputError(f"run_dir: cannot write {path}: {error.strerror}") from None


def load_tasks(config: TrainConfig, tokenizer: Tokenizer) -> tuple[list[Task], list[Task]]:
    """Training rows and held-out rows (none without data.eval), checked against the bucket table."""
    examples = load_examples(config.data.train)
    if config.data.minus is not None:
        examples = subtract(examples, load_examples(config.data.minus))
    examples = select(examples, config.data.where)
    tasks = encode_tasks(examples, config.data.train, tokenizer, config)
    if config.data.eval is None:
        return tasks, []
    held_out = load_examples(config.data.eval)
    check_disjoint(examples, held_out)
    return tasks, encode_tasks(held_out[: config.eval.rows], config.data.eval, tokenizer, config)


def _differences(old: dict, new: dict, path: str = ""):
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield path + key, before, after
