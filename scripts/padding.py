"""How much of what prefill computes is padding, on rows with rubrics: prompts as rollouts, and their grading.

python scripts/padding.py HEALTHBENCH.jsonl --tokenizer DIRECTORY

In steps of 32 prompts and 4 responses of about --response tokens each (log-normal, seeded: their lengths are
all that counts), in sizes of `ladder`. Nothing is computed but lengths.
"""

import argparse
import dataclasses

import numpy as np
from rich.console import Console
from rich.table import Table

from srrl_jax.data import load_examples
from srrl_jax.grading import GradingItem
from srrl_jax.grading.asking import Question
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.rubrics import load_template
from srrl_jax.sampling import Buckets
from srrl_jax.sampling.buckets import Lengths, ladder, plan_waves

PROMPTS, GROUP = 32, 4


def computed(lengths: Lengths, rows: tuple[int, ...]) -> np.ndarray:
    """Places of prefixes and of lanes in the waves of all rows, and the number of waves."""
    fan_out = ladder(map(len, lengths.branches), least=4)
    table = Buckets(ladder(lengths.prefix), fan_out, ladder(n for row in lengths.branches for n in row), rows)
    waves = plan_waves(lengths, table)
    places = [len(w.indices) * np.array([w.prefix, w.lanes * w.branch]) for w in waves]
    return np.array([*sum(places), len(waves)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--template", default="shared")
    parser.add_argument("--response", type=int, default=500)
    parser.add_argument("--seats", type=int, nargs="*", default=[1, 2, 4, 8])
    args = parser.parse_args()
    tokenizer, random = load_tokenizer(args.tokenizer), np.random.default_rng(0)
    question = Question(tokenizer, load_template(args.template))
    trunk = sum(question.trunk)
    examples = load_examples(args.rows)
    steps = [examples[i : i + PROMPTS] for i in range(0, len(examples) - PROMPTS + 1, PROMPTS)]
    ways = ("prompts", "grading", "grading, trunk in each prefix", "grading, a lane for each criterion")
    total = {way: np.zeros(5) for way in ways}  # real tokens of prefixes and branches, then `computed`

    def add(way: str, lengths: Lengths) -> None:
        real = [sum(lengths.prefix), sum(map(sum, lengths.branches))]
        total[way] += [*real, *computed(lengths, tuple(args.seats))]

    for step in steps:
        prompts = [tokenizer.encode(tokenizer.render(list(e.prompt), thinking=False)) for e in step]
        add("prompts", Lengths(list(map(len, prompts)), [[0] * GROUP] * len(step)))
        items = [GradingItem(e.prompt, "", e.rubrics) for e in step]
        prefix = np.repeat([len(question.prefix(item)) for item in items], GROUP)
        prefix += random.lognormal(np.log(args.response), 0.6, len(prefix)).astype(int)
        criteria = [
            [len(question.branch([c])) for c in item.criteria] for item in items for _ in range(GROUP)
        ]
        whole, rest = (Lengths(lengths.tolist(), criteria) for lengths in (prefix, prefix - trunk))
        add("grading", rest)
        add("grading, trunk in each prefix", whole)
        add("grading, a lane for each criterion", dataclasses.replace(rest, apart=True))
    table = Table(title=f"{len(steps)} steps of {PROMPTS} x {GROUP}; a trunk of {trunk} tokens")
    for column in ("", "real tokens", "padding of prefixes", "of branches", "of all", "waves a step"):
        table.add_column(column, justify="right")
    for way, (prefix, branch, prefixes, lanes, waves) in total.items():
        shares = [
            1 - prefix / prefixes,
            1 - branch / max(lanes, 1),
            1 - (prefix + branch) / (prefixes + lanes),
        ]
        cells = [f"{share:.1%}" if branch or i != 1 else "–" for i, share in enumerate(shares)]
        table.add_row(way, f"{prefix + branch:,.0f}", *cells, f"{waves / len(steps):.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
