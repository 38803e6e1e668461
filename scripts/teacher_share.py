"""What a share of teacher-graded lessons does to a base that grades badly, in the tiny world.

    python scripts/make_tiny_model.py --noise 0.6 --out runs/noisy
    python scripts/teacher_share.py model=runs/noisy [key=value ...]

The teacher is the oracle, asked about the base's own answers to 40 training rows alone. Each run is the
demo's recipe with another share of lessons; the table sets grading and answering side by side, as mean and
standard error over seeds. Stopped, the same command goes on.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from demo import grader_accuracy, oracle_curve
from flax import nnx
from rich.console import Console
from rich.table import Table

from srrl_jax import TrainConfig, train
from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint
from srrl_jax.parallel import make_mesh
from srrl_jax.sampling import SamplingConfig
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_reply
from srrl_jax.training.experience import make_actor
from srrl_jax.training.tasks import load_tasks

SHARES = (0, 0.01, 0.05, 0.2)
SEEDS = (0, 1, 2)
ROWS = 40
ROOT = Path("runs/teacher_share")
RECIPE = [
    "steps=40",
    "prompts_per_step=8",
    "loss.aggregate=sequence",  # a short verdict weighs as much as a long answer
    "optimizer.microbatch=8",
    "optimizer.learning_rate=3e-4",
    "eval.every=40",
    "eval.frozen=false",
    f"data.teacher={ROOT / 'lessons.jsonl'}",
]


def write_lessons(config: TrainConfig) -> Counter:
    """The oracle's verdicts on the base's answers to the first rows, as `srrl grade` writes them; counted."""
    examples = load_examples(config.data.train)[:ROWS]
    answering = AnswerConfig(config.rollout.max_new_tokens, sampling=SamplingConfig())
    prompts = [example.prompt for example in examples]
    answers = Checkpoint(config.model).answer(prompts, range(ROWS), jax.random.key(0), answering)
    path = Path(config.data.teacher)
    path.parent.mkdir(parents=True, exist_ok=True)
    met = Counter()
    with path.open("w") as file:
        for example, answer in zip(examples, answers, strict=True):
            replies = [json.loads(grader_reply(answer.response, c.criterion)) for c in example.rubrics]
            verdicts = [{"met": r["criteria_met"], "explanation": r["explanation"]} for r in replies]
            met.update(verdict["met"] for verdict in verdicts)
            line = example.to_dict() | {"response": answer.response, "verdicts": verdicts}
            file.write(json.dumps(line) + "\n")
    return met


def figures(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Grader accuracy, oracle score and self-given score on Hard before and after a run."""
    final = train(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = load_model(config.model, mesh=mesh)
        tokenizer = load_tokenizer(config.model)
        lengths = load_tasks(config, tokenizer).lengths(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        accuracy = [grader_accuracy(actor, p) for p in (nnx.state(model), final.params)]
    run_dir = Path(config.run_dir)
    truth = [score for _, score in oracle_curve(read_jsonl(run_dir / "samples.jsonl"), "eval")]
    own = [row["eval/self"] for row in read_jsonl(run_dir / "metrics.jsonl") if "eval/self" in row]
    before, after = ([column[place] for column in (accuracy, truth, own)] for place in (0, -1))
    return before, after


def add_row(table: Table, name: str, runs: list[list[float]]) -> None:
    means = np.mean(runs, axis=0)
    errors = np.std(runs, axis=0, ddof=1) / len(runs) ** 0.5
    table.add_row(name, *[f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)])


def main() -> None:
    jax.config.update("jax_compilation_cache_dir", str(ROOT / "programs"))
    base = TrainConfig.load("configs/demo.yaml", RECIPE + sys.argv[1:])
    met = write_lessons(base)
    print(f"lessons: {met[True]} met, {met[False]} not met", flush=True)
    table = Table(title=f"{base.steps} steps of {base.prompts_per_step} prompts; lessons from {ROWS} rows")
    for column in ("lessons", "grader accuracy", "oracle score, Hard", "score it gives itself"):
        table.add_column(column, justify="right")
    before, after = [], {share: [] for share in SHARES}
    for seed in SEEDS:
        for share in SHARES:
            keys = [f"run_dir={ROOT}/share_{share}_{seed}", f"data.teacher_share={share}", f"seed={seed}"]
            start, end = figures(TrainConfig.load("configs/demo.yaml", RECIPE + sys.argv[1:] + keys))
            print(f"seed {seed}, {share:.0%}: from {start} to {end}", flush=True)
            after[share].append(end)
        before.append(start)
    add_row(table, "before", before)
    for share, runs in after.items():
        add_row(table, f"{share:.0%}", runs)
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"teacher_share: {error}", file=sys.stderr)
        sys.exit(2)
