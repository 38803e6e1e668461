"""What a share of teacher-graded lessons does to a base that grades badly, in the tiny world.

    python scripts/make_tiny_model.py --steps 250 --out runs/weak
    python scripts/teacher_share.py model=runs/weak [key=value ...]

The teacher is the oracle, asked about the base's own answers to 40 training rows alone. Each run is the
demo's recipe with another share of lessons; the table sets grading and answering side by side.
"""

import json
import sys
from pathlib import Path

import jax
from demo import grader_accuracy, oracle_curve
from flax import nnx
from rich.console import Console
from rich.table import Table

from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint
from srrl_jax.models import Qwen3
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.parallel import make_mesh
from srrl_jax.sampling import SamplingConfig
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import oracle
from srrl_jax.training import TrainConfig, train
from srrl_jax.training.experience import SelfRewarder

SHARES = (0, 0.01, 0.05, 0.2)
ROWS = 40
RECIPE = ["steps=30", "eval.every=30", "rollout.prompt_buckets=[136]"]


def write_lessons(config: TrainConfig, path: Path) -> None:
    """The oracle's verdicts on the base's answers to the first rows, as `srrl grade` writes them."""
    examples = load_examples(config.data.train)[:ROWS]
    answering = AnswerConfig(config.rollout.max_new_tokens, sampling=SamplingConfig())
    prompts = [example.prompt for example in examples]
    answers = Checkpoint(config.model).answer(prompts, range(ROWS), jax.random.key(0), answering)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for example, answer in zip(examples, answers, strict=True):
            verdicts = [{"met": oracle(answer.response, c.criterion)} for c in example.rubrics]
            line = example.to_dict() | {"response": answer.response, "verdicts": verdicts}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    root = Path("runs/teacher_share")
    base = TrainConfig.load("configs/demo.yaml", RECIPE + sys.argv[1:])
    lessons = root / "lessons.jsonl"
    write_lessons(base, lessons)
    table = Table(title=f"{base.steps} steps of {base.prompts_per_step} prompts; lessons from {ROWS} rows")
    for column in ("lessons", "grader accuracy", "oracle score, Hard", "score it gives itself"):
        table.add_column(column, justify="right")
    for share in SHARES:
        run_dir = root / f"share_{share}"
        keys = [f"run_dir={run_dir}", f"data.teacher={lessons}", f"data.teacher_share={share}"]
        config = TrainConfig.load("configs/demo.yaml", RECIPE + sys.argv[1:] + keys)
        final = train(config)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            model = Qwen3.from_pretrained(config.model, mesh=mesh)
            rewarder = SelfRewarder(model, load_tokenizer(config.model), config, mesh)
            before, after = (grader_accuracy(rewarder, p) for p in (nnx.state(model), final.params))
        truth = [score for _, score in oracle_curve(read_jsonl(run_dir / "samples.jsonl"), "eval")]
        own = [row["eval/self"] for row in read_jsonl(run_dir / "metrics.jsonl") if "eval/self" in row]
        if share == SHARES[0]:
            table.add_row("before", f"{before:.3f}", f"{truth[0]:.3f}", f"{own[0]:.3f}")
        table.add_row(f"{share:.0%}", f"{after:.3f}", f"{truth[-1]:.3f}", f"{own[-1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"teacher_share: {error}", file=sys.stderr)
        sys.exit(2)
