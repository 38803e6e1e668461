"""Speed and memory of `srrl view` and `srrl report` on a run of many samples. Prints one JSON line.

    python scripts/bench_view.py FOLDER [--samples 100000]

Writes a synthetic run to FOLDER, where none is: HealthBench's sizes (a prompt of 900 characters, 12 criteria,
answers of 1,700, reasons of 100), groups of 8, 13 KB a sample. Reads it into the index, asks each question
that the page asks (first, and the slowest of three tries after that), and measures resident memory. The
report is measured in a process of its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchlib import report

WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ser", "tu") for b in ("ra", "ne", "vo", "")
         for c in ("d", "st", "n", "ing", "s")]  # fmt: skip


def generate(folder: Path, samples: int) -> None:
    random.seed(0)

    def text(characters: int) -> str:
        return " ".join(random.choices(WORDS, k=characters // 5))

    pool = [text(100) for _ in range(5000)]
    answers = [text(1900) for _ in range(500)]
    prompts = [
        ([{"role": "user", "content": text(900)}],
         [(text(180), random.choice((-8, -3, 4, 5, 7, 10)), random.choice("abcde")) for _ in range(12)])
        for _ in range(2000)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: synthetic\nsteps: 400\n")
    with (folder / "samples.jsonl").open("w") as log, (folder / "metrics.jsonl").open("w") as metrics:
        for n in range(samples):
            step, place = 1 + n // 256, n // 8 % len(prompts)
            prompt, rubric = prompts[place]
            answer = random.choice(answers)
            answer = answer[random.randrange(400) :] + (" a rare zebra" if n % 9973 == 0 else "")
            criteria = [
                {"criterion": criterion, "points": points, "tags": [f"axis:{axis}"],
                 "verdict": (met := random.random() < 0.5), "probability": float(met),
                 "explanation": random.choice(pool), "tries": 1, "tokens": 30.0,
                 "frozen": met ^ (random.random() < 0.1), "frozen_explanation": random.choice(pool)}
                for criterion, points, axis in rubric
            ]  # fmt: skip
            row = {
                "step": step, "split": "train" if n // 8 % 8 else "eval", "prompt_id": f"row-{place:05d}",
                "example_tags": [f"theme:{place % 7}"], "sample": n % 8, "prompt": prompt,
                "completion": answer, "response": answer, "tokens": len(answer) // 4,
                "reward": random.random(), "advantage": random.gauss(0, 1),
                "truncated": random.random() < 0.02, "criteria": criteria,
            }  # fmt: skip
            log.write(json.dumps(row) + "\n")
            if n % 256 == 255:
                metrics.write(json.dumps({"step": step, "reward/mean": random.random(), "kl": 0.01}) + "\n")


def timed(call, tries: int = 1) -> float:
    took = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return round(max(took), 3)


def resident(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    args = parser.parse_args()
    if not args.folder.exists():
        generate(args.folder, args.samples)
    figures = {"megabytes": (args.folder / "samples.jsonl").stat().st_size // 10**6}
    command = [sys.executable, "-m", "srrl_jax", "report", str(args.folder)]
    figures["report_s"] = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    figures["report_mb"] = resident(resource.RUSAGE_CHILDREN)

    from srrl_jax.viewer.index import Index
    from srrl_jax.viewer.queries import QUERIES

    index = Index([args.folder])
    figures["index_s"] = timed(index.refresh)
    asked = {
        "first page": ("samples", {}),
        "split and reward": ("samples", {"split": "eval", "reward": "0.2..0.4", "sort": "reward"}),
        "disagreement": ("samples", {"verdict": "differ", "axis": "c"}),
        "text, rare": ("samples", {"text": "a rare zebra"}),
        "text, common": ("samples", {"text": "kara"}),
        "sample": ("sample", {"open": "54321"}),
        "criteria": ("criteria", {}),
        "by axis": ("criteria", {"by": "axis"}),
        "overview": ("overview", {}),
        "next to label": ("label", {}),
    }
    for name, (question, params) in asked.items():
        once = lambda q=question, p=params: QUERIES[q](index, p)  # noqa: E731
        figures[name] = [timed(once), timed(once, tries=3)]
    figures["viewer_mb"] = resident()
    report("view", **figures)


if __name__ == "__main__":
    main()
