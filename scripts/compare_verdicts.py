"""How far the ways to ask for a verdict agree: the three modes, the two prompts, votes, one query for all.

python scripts/compare_verdicts.py                                     # the embedded model on its own world
python scripts/compare_verdicts.py --model runs/smollm2-135m --rows HEALTHBENCH.jsonl --limit 8 \
    --template configs/short_grader.txt

On rows, the responses graded are the model's own greedy answers. On the tiny world the truth is known, and
the first column is the share of verdicts that are right. Each way is compared with the first of `--ways`;
`ranks` is Spearman's correlation of P(met), NaN where one of them is the same throughout: a weak grader that
meets nothing may still rank criteria.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from srrl_jax.data import load_examples
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint
from srrl_jax.grading import GradingItem, JudgeConfig
from srrl_jax.grading.voting import Verdict
from srrl_jax.sampling import SamplingConfig
from srrl_jax.tinyworld import grader_pairs

WORLD = Path(__file__).resolve().parents[1] / "srrl_jax" / "tinyworld"
WAYS = {
    "generate": {},
    "generate, 3 votes": {"votes": 3, "sampling": SamplingConfig(temperature=0.6)},
    "generate, together": {"together": True},
    "generate, healthbench prompt": {"template": "healthbench"},
    "constrained": {"verdict": "constrained", "sampling": SamplingConfig(temperature=0.6)},
    "logits": {"verdict": "logits"},
    "logits, controls": {"verdict": "logits", "calibrate": "controls"},
    "logits, shared prompt": {"verdict": "logits", "template": "shared"},
    "logits, healthbench prompt": {"verdict": "logits", "template": "healthbench"},
}


def compare(one: list[Verdict], other: list[Verdict]) -> tuple[float, float, float]:
    """Of verdicts that both read: the share that agrees, Cohen's kappa, the rank correlation of P(met)."""
    both = [pair for pair in zip(one, other, strict=True) if None not in (pair[0].met, pair[1].met)]
    if not both:
        return (math.nan,) * 3
    (a, b), (p, q) = np.array([[(v.met, v.probability) for v in pair] for pair in both]).T
    agree, chance = np.mean(a == b), np.mean(a) * np.mean(b) + np.mean(1 - a) * np.mean(1 - b)
    constant = np.ptp(p) == 0 or np.ptp(q) == 0
    beyond = (agree - chance) / (1 - chance) if chance < 1 else math.nan
    return agree, beyond, math.nan if constant else spearmanr(p, q).statistic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(WORLD / "checkpoint"))
    parser.add_argument("--rows", help="rows with rubrics; without them the tiny world's 400 known verdicts")
    parser.add_argument("--template", help="by name or file; `shared`, or the tiny world's own")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--new", type=int, default=64, help="most tokens of a verdict")
    parser.add_argument("--ways", nargs="*", default=None, help=f"of: {', '.join(WAYS)}")
    args = parser.parse_args()

    import jax

    checkpoint, key = Checkpoint(args.model), jax.random.key(0)
    greedy = SamplingConfig(temperature=0)
    if args.rows:
        examples = load_examples(args.rows)[: args.limit]
        config = AnswerConfig(max_new_tokens=64, sampling=greedy)
        answers = checkpoint.answer([e.prompt for e in examples], range(len(examples)), key, config)
        items = [GradingItem(e.prompt, a.response, e.rubrics) for e, a in zip(examples, answers, strict=True)]
        truth, prompt = None, args.template or "shared"
    else:
        pairs = grader_pairs()[: args.limit]
        items = [GradingItem(messages, response, [criterion]) for messages, response, criterion, _ in pairs]
        truth, prompt = [met for *_, met in pairs], args.template or str(WORLD / "grader.txt")
    # The embedded model's language has no words for other prompts than its own.
    ways = args.ways or [way for way in WAYS if args.rows or not way.endswith("prompt")]

    table = Table("", "right" if truth else "met", "unscorable", "agreement", "kappa", "ranks", "verdicts/s")
    first = None
    for way in ways:
        options = {"template": prompt, "sampling": greedy, "max_new_tokens": args.new} | WAYS[way]
        began = time.perf_counter()
        rows = checkpoint.grade(items, key, JudgeConfig(**options))
        seconds = time.perf_counter() - began
        given = [verdict for row in rows for verdict in row]
        first = first or given
        verdicts = [verdict.met for verdict in given]
        read = [met for met in verdicts if met is not None]
        share = sum(a == b for a, b in zip(verdicts, truth, strict=True)) if truth else sum(read)
        right, unread = share / max(len(truth or read), 1), 1 - len(read) / len(given)
        agree, beyond, ranks = compare(first, given)
        row = (way, f"{right:.3f}", f"{unread:.3f}", f"{agree:.3f}", f"{beyond:.2f}", f"{ranks:.2f}")
        row += (f"{len(given) / seconds:.1f}",)
        table.add_row(*row)
        print(*row, sep=" | ", flush=True)  # at once: the next way may take minutes
    Console(width=110).print(table)
    print(f"{len(first)} criteria of {len(items)} responses; agreement, kappa and ranks with the first line")


if __name__ == "__main__":
    main()
