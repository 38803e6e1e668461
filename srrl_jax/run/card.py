"""The model card of an export: README.md with front matter, as model hubs read it."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from etils import epath

from srrl_jax import storage
from srrl_jax.telemetry import iter_jsonl
from srrl_jax.telemetry.text import number
from srrl_jax.training.config import TrainConfig

# What the scores of a run are; the keys of its metrics.
SCORES = {
    "reward/mean": "reward that the model gave its own answers to training prompts",
    "eval/self": "held-out rows, graded by the model itself",
    "eval/frozen": "held-out rows, graded by the weights that training started from",
    "eval/teacher": "held-out rows, graded by the teacher",
    "eval/own": "held-out rows, graded by the grader that was handed to `train`",
}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def write_card(
    run_dir: epath.Path, out: epath.Path, config: TrainConfig, step: int, *, adapter: bool
) -> None:
    """Writes `out/README.md`: what was trained from what, on which rows, its scores and the run's warnings.

    Of paths of this machine only the last part is told.

    Args:
      step: of the exported checkpoint; what the run wrote after it is left out.
      adapter: whether the directory holds adapters alone.
    """
    logs = {
        name: [row for row in iter_jsonl(run_dir / f"{name}.jsonl") if row["step"] <= step]
        if storage.parts(run_dir / f"{name}.jsonl")
        else []
        for name in ("metrics", "events")
    }
    recipe = without_paths(storage.read_yaml(run_dir / "config.yaml"))
    known = {key: [row[key] for row in logs["metrics"] if row.get(key) is not None] for key in SCORES}
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["srrl_jax", "grpo", "rubrics", "self-rewarding"],
    }
    if _HUB_ID.fullmatch(config.model) and not Path(config.model).exists():
        front["base_model"] = config.model  # hubs take ids alone
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.jinja")
    text = template.render(
        front=yaml.safe_dump(front, sort_keys=False),
        model=without_paths(config.model),
        step=step,
        rows={
            name: without_paths(str(source))
            for name, source in (("Training", config.data.train), ("Held-out", config.data.eval))
            if source
        },
        scores=[
            (SCORES[key], number(values[0]), number(values[-1])) for key, values in known.items() if values
        ],
        warnings=[
            (row["step"], " ".join(row["message"].split()))
            for row in logs["events"]
            if row["event"] == "warning"
        ],
        adapter=adapter,
        rank=config.lora.rank,
        recipe=yaml.safe_dump(recipe, sort_keys=False).rstrip(),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def without_paths(value: Any) -> Any:
    """`value` with absolute paths cut to their last part, through lists and objects."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
