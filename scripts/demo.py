"""The demo: trains the embedded tiny model by self-reward, then holds the result against the oracle.

    python scripts/demo.py [key=value ...]        (scripts/demo.sh makes the environment and runs it)

Training sees neither the oracle nor the held-out Hard rows. Both curves of the report come from the
samples that training wrote down: the reward that the model gave itself, and what a program that
knows the truth would have given.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from srrl_jax import TrainConfig, train
from srrl_jax.actor import Actor
from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem
from srrl_jax.parallel import make_mesh
from srrl_jax.rubrics import Criterion, score_response
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_pairs, oracle
from srrl_jax.training.experience import make_actor
from srrl_jax.training.tasks import load_tasks
from srrl_jax.viewer.report import write_report


def oracle_curve(samples: list[dict], split: str) -> list[tuple[int, float]]:
    """Mean oracle score of a split's completions at each step that has any."""
    scores = defaultdict(list)
    for row in samples:
        if row["split"] == split:
            criteria = [Criterion(c["criterion"], c["points"]) for c in row["criteria"]]
            truth = [oracle(row["response"], criterion.criterion) for criterion in criteria]
            scores[row["step"]].append(score_response(criteria, truth))
    return [(step, sum(values) / len(values)) for step, values in sorted(scores.items())]


def grader_accuracy(actor: Actor, params) -> float:
    """Share of right verdicts on fixed answers to held-out prompts, half of them met; unreadable is wrong."""
    pairs = grader_pairs()
    items = [GradingItem(messages, response, [criterion]) for messages, response, criterion, _ in pairs]
    verdicts = actor.grader.grade(params, items, jax.random.key(0))
    return sum(row[0].met is truth for row, (*_, truth) in zip(verdicts, pairs, strict=True)) / len(pairs)


def main() -> None:
    start = time.time()
    config = TrainConfig.load("configs/demo.yaml", sys.argv[1:])
    run_dir = Path(config.run_dir)
    final = train(config)

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = load_model(config.model, mesh=mesh)
        tokenizer = load_tokenizer(config.model)
        lengths = load_tasks(config, tokenizer).lengths(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        accuracy = [grader_accuracy(actor, params) for params in (nnx.state(model), final.params)]

    samples = read_jsonl(run_dir / "samples.jsonl")
    hard, easy = oracle_curve(samples, "eval"), oracle_curve(samples, "train")
    self_given = [row["eval/self"] for row in read_jsonl(run_dir / "metrics.jsonl") if "eval/self" in row]
    table = [
        {"what": "Oracle score, held-out Hard prompts", "before": hard[0][1], "after": hard[-1][1]},
        {"what": "Score it gives itself there", "before": self_given[0], "after": self_given[-1]},
        {"what": "Grader accuracy, fixed held-out answers", "before": accuracy[0], "after": accuracy[1]},
    ]
    curves = {"oracle score (held-out Hard)": hard, "oracle score (train)": easy}
    report = write_report(run_dir, curves=curves, table=table, title="Self-rewarding in the tiny world")
    summary = {
        "oracle_hard_before": hard[0][1],
        "oracle_hard_after": hard[-1][1],
        "grader_accuracy_before": accuracy[0],
        "grader_accuracy_after": accuracy[1],
        "seconds": time.time() - start,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    shown = Table(title=f"{config.steps} steps of self-rewarding GRPO, {summary['seconds']:.0f} s")
    for column in ("", "before", "after"):
        shown.add_column(column, justify="right" if column else "left")
    for row in table:
        shown.add_row(row["what"], f"{row['before']:.3f}", f"{row['after']:.3f}")
    Console().print(shown)
    print(f"report: {report}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
