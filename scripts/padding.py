"""How much of what prefill computes is padding, on rows with rubrics: prompts as rollouts, and their grading.

python scripts/padding.py HEALTHBENCH.jsonl --tokenizer DIRECTORY

In steps of 32 prompts and 4 responses of about --response tokens each (log-normal, seeded: their lengths are
all that counts), in the shapes that training would plan for these rows. Nothing is computed but lengths.
Where replies are written, a fifth of those that run end in each chunk of tokens, and rows wait for their
slots.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples
from srrl_jax.grading import GradingItem
from srrl_jax.grading.asking import GraderPrompt
from srrl_jax.models.presets import PRESETS
from srrl_jax.rubrics import load_template
from srrl_jax.sampling import RowLengths
from srrl_jax.sampling.scheduler import Scheduler, batches, sort_rows
from srrl_jax.sampling.shapes import Memory, Shapes, plan_shapes
from srrl_jax.training.shapes import with_responses

PROMPTS, GROUP, LONGEST = 32, 4, 3072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--template", default="shared")
    parser.add_argument("--response", type=int, default=500)
    args = parser.parse_args()
    tokenizer, random = load_tokenizer(args.tokenizer), np.random.default_rng(0)
    question = GraderPrompt(tokenizer, load_template(args.template))
    examples = load_examples(args.rows)
    prompts = [tokenizer.encode(tokenizer.render(list(e.prompt), thinking=False)) for e in examples]
    asked = [question.prefix(GradingItem(e.prompt, "", e.rubrics)) for e in examples]
    shared = len(question.shared(asked))
    criteria = [[len(question.branch([c])) for c in e.rubrics] for e in examples]
    memory = Memory(PRESETS["qwen3-0.6b"], np.float32, sys.maxsize)
    rollouts = [RowLengths(len(prompt), [0] * GROUP) for prompt in prompts]
    graded = [RowLengths(len(p) - shared, branches) for p, branches in zip(asked, criteria, strict=True)]

    def responses(rows: list[RowLengths]) -> list[RowLengths]:
        lengths = np.minimum(random.lognormal(np.log(args.response), 0.6, (len(rows), GROUP)), LONGEST)
        return [
            RowLengths(row.prefix + int(length), row.branches)
            for row, drawn in zip(rows, lengths, strict=True)
            for length in drawn
        ]

    def runs(rows: list[RowLengths], shapes: Shapes, writes: bool) -> int:
        """Of prefill."""
        order = sort_rows(rows, shapes)
        if not writes:
            return len(list(batches(rows, order, shapes, 1)))
        scheduler, count = Scheduler(rows, order, shapes), 0
        while scheduler.waiting or scheduler.running.any():
            while batch := scheduler.next_batch():
                scheduler.admit(batch)
                count += 1
            scheduler.finish(scheduler.running.reshape(-1) & (random.random(shapes.slots) > 0.2))
        return count

    table = Table(title=f"{len(examples) // PROMPTS} steps of {PROMPTS} x {GROUP}; {shared} shared tokens")
    for column in ("", "real tokens", "padding", "tokens of a pack", "packs a step"):
        table.add_column(column, justify="right")
    steps = range(0, len(rollouts) - PROMPTS + 1, PROMPTS)
    for what, rows, expected, made in (
        ("prompts", rollouts, rollouts, list),
        ("verdicts from logits", graded, with_responses(graded, LONGEST), responses),
        ("verdicts written", graded, with_responses(graded, LONGEST), responses),
    ):
        together = PROMPTS * (1 if made is list else GROUP)
        shapes = plan_shapes(expected, 256, memory, together=together)
        drawn = [made(rows[start : start + PROMPTS]) for start in steps]
        real = sum(row.tokens for step in drawn for row in step)
        packs = sum(runs(step, shapes, "logits" not in what) for step in drawn)
        share = 1 - real / (packs * shapes.pack)
        table.add_row(what, f"{real:,}", f"{share:.1%}", str(shapes.pack), f"{packs / len(steps):.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
