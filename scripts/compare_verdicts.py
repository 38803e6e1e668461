"""How far the ways to ask for a verdict agree: the three modes, the two prompts, votes, one query for all.

python scripts/compare_verdicts.py                                     # the embedded model on its own world
python scripts/compare_verdicts.py --model runs/smollm2-135m --rows HEALTHBENCH.jsonl --limit 8

On rows, the responses graded are the model's own greedy answers. On the tiny world the truth is known, and
the first column is the share of verdicts that are right.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from srrl_jax.data import load_examples
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint
from srrl_jax.grading import GradingItem, JudgeConfig
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
    "logits, healthbench prompt": {"verdict": "logits", "template": "healthbench"},
}


def kappa(one: list[bool], other: list[bool]) -> float:
    """Cohen's: agreement beyond chance; NaN where both always say the same."""
    n = len(one)
    agree = sum(a == b for a, b in zip(one, other, strict=True)) / n
    chance = sum(one) / n * sum(other) / n + (1 - sum(one) / n) * (1 - sum(other) / n)
    return (agree - chance) / (1 - chance) if chance < 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(WORLD / "checkpoint"))
    parser.add_argument("--rows", help="rows with rubrics; without them the tiny world's 400 known verdicts")
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
        truth, prompt = None, "shared"
    else:
        pairs = grader_pairs()[: args.limit]
        items = [GradingItem(messages, response, [criterion]) for messages, response, criterion, _ in pairs]
        truth, prompt = [met for *_, met in pairs], str(WORLD / "grader.txt")
    # The embedded model's language has no words for HealthBench's prompt.
    ways = args.ways or [way for way in WAYS if args.rows or "healthbench" not in way]

    table = Table("", "right" if truth else "met", "unscorable", "agreement", "kappa", "verdicts/s")
    first = None
    for way in ways:
        options = {"template": prompt, "sampling": greedy, "max_new_tokens": args.new} | WAYS[way]
        began = time.perf_counter()
        rows = checkpoint.grade(items, key, JudgeConfig(**options))
        seconds = time.perf_counter() - began
        verdicts = [verdict.met for row in rows for verdict in row]
        first = first or verdicts
        read = [met for met in verdicts if met is not None]
        share = sum(a == b for a, b in zip(verdicts, truth, strict=True)) if truth else sum(read)
        both = [(a, b) for a, b in zip(first, verdicts, strict=True) if None not in (a, b)]
        agree, beyond = "–", "–"
        if both:
            agree, beyond = f"{sum(a == b for a, b in both) / len(both):.3f}", f"{kappa(*zip(*both)):.2f}"  # noqa: B905
        right, unread = share / max(len(truth or read), 1), 1 - len(read) / len(verdicts)
        row = (way, f"{right:.3f}", f"{unread:.3f}", agree, beyond, f"{len(verdicts) / seconds:.1f}")
        table.add_row(*row)
        print(*row, sep=" | ", flush=True)  # at once: the next way may take minutes
    Console(width=110).print(table)
    print(f"{len(first)} criteria of {len(items)} responses; agreement and kappa with the first line")


if __name__ == "__main__":
    main()
