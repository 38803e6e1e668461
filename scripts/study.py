"""The paper's claims in the tiny world, where the truth is known: arms, seeds, tables and pictures.

    python scripts/study.py [--claims d,e] [--seeds 5] [--out runs/study]

An arm is a recipe: the demo's with the claim's overrides and its own. Every finished run is a line of
OUT/results.jsonl, so the same command goes on where it was stopped; each seed goes through all arms
before the next. Tables have the mean over seeds and the half-width of its 95% t-interval. Training never
sees the oracle.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from demo import oracle_curve
from flax import nnx
from teacher_share import write_lessons

from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem
from srrl_jax.models import Qwen3
from srrl_jax.models.tokenizer import load_tokenizer
from srrl_jax.parallel import make_mesh
from srrl_jax.telemetry import iter_jsonl, read_jsonl
from srrl_jax.tinyworld import grader_pairs
from srrl_jax.training import TrainConfig, train
from srrl_jax.training.experience import make_actor
from srrl_jax.training.run import load_tasks


@dataclass(frozen=True)
class Claim:
    """`base` are arguments of make_tiny_model.py; `arms` map a name to overrides after those of `recipe`."""

    title: str
    base: tuple[str, ...]
    recipe: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]


NOISY = ("--noise", "0.6")
LESSONS = ("data.teacher_share=0.2",)
CLAIMS = {
    "d": Claim(
        "lessons from a teacher's verdicts, for a base that grades badly",
        NOISY,
        (
            "steps=20",
            "prompts_per_step=8",
            "loss.aggregate=sequence",  # a short verdict weighs as much as a long answer
            "optimizer.microbatch=8",
            "optimizer.learning_rate=3e-4",
            "eval.every=20",
            "eval.rows=64",
            "eval.frozen=false",
            "checkpoint.every=20",
        ),
        {
            "no lessons": ("data.teacher_share=0",),
            "20%, grpo": LESSONS,
            "20%, sft": (*LESSONS, "data.teacher_loss=sft"),
            "20%, both": (*LESSONS, "data.teacher_loss=both"),
        },
    ),
    "e": Claim(
        "guards against a hacked grader, at ten times the demo's learning rate",
        NOISY,
        (
            "steps=12",
            "prompts_per_step=8",
            "optimizer.microbatch=8",
            "optimizer.learning_rate=1e-3",
            "kl_coef=0",
            "eval.every=3",
            "eval.rows=48",
            "checkpoint.every=12",
        ),
        {
            "no guard": (),
            "KL 0.05": ("kl_coef=0.05",),
            "half of the criteria": ("reward.criteria_dropout=0.5",),
            "frozen grader": ("grader=frozen",),
            "stop on warning": ("eval.stop_on_warning=true",),
        },
    ),
}
PLAIN = str.maketrans({" ": "_", "%": None, ",": None})  # names of arms as names of folders
COLUMNS = {
    "truth": "oracle score",
    "own": "score by itself",
    "accuracy": "grader accuracy",
    "accuracy_item": "of items",
    "accuracy_style": "of style",
    "control": "met by empty answers",
    "steps": "steps done",
}


def make_base(claim: Claim, out: Path) -> Path:
    """The claim's base, made where it is not there yet."""
    path = out / "bases" / "_".join(word.strip("-") for word in claim.base)
    if not (path / "model.safetensors").exists():
        script = Path(__file__).with_name("make_tiny_model.py")
        subprocess.run([sys.executable, str(script), *claim.base, "--out", str(path)], check=True)
    return path


def accuracies(config: TrainConfig, params) -> list[dict[str, float]]:
    """Share of right verdicts on the fixed test, in all and by kind: of the base, then with `params`."""
    pairs = grader_pairs()
    items = [GradingItem(messages, response, [criterion]) for messages, response, criterion, _ in pairs]
    style = np.array([c.axis not in ("completeness", "accuracy") for *_, c, _ in pairs])
    mesh, found = make_mesh(config.mesh), []
    with jax.set_mesh(mesh):
        model = Qwen3.from_pretrained(config.model, mesh=mesh)
        tokenizer = load_tokenizer(config.model)
        lengths = load_tasks(config, tokenizer).lengths(config)
        actor = make_actor(model, tokenizer, config, mesh, lengths)
        for weights in (nnx.state(model), params):
            verdicts = actor.grader.grade(weights, items, jax.random.key(0))
            right = np.array([row[0].met is pair[-1] for row, pair in zip(verdicts, pairs, strict=True)])
            kinds = {"": right, "_item": right[~style], "_style": right[style]}
            found.append({f"accuracy{kind}": float(values.mean()) for kind, values in kinds.items()})
    return found


def run_arm(config: TrainConfig) -> list[dict]:
    """Trains, and returns what is true at each evaluation; the first and last have the grader's accuracy."""
    final = train(config)
    run_dir = Path(config.run_dir)
    truth = dict(oracle_curve(read_jsonl(run_dir / "samples.jsonl"), "eval"))
    names = {"own": "eval/self", "frozen": "eval/frozen", "control": "grader/control_met_rate"}
    curve = [
        {"steps": row["step"], "truth": truth[row["step"]]}
        | {short: row[name] for short, name in names.items() if row.get(name) is not None}
        for row in iter_jsonl(run_dir / "metrics.jsonl")
        if "eval/self" in row
    ]
    before, after = accuracies(config, final.params)
    curve[0] |= before
    curve[-1] |= after
    return curve


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95% t-interval; the mean alone of one value."""
    mean = f"{np.mean(values):.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values):.3f}"


def write_tables(out: Path, rows: list[dict]) -> None:
    """OUT/tables.md and a picture for each claim, of the runs so far."""
    lines = []
    for name, claim in CLAIMS.items():
        runs = defaultdict(list)
        for row in rows:
            if row["claim"] == name:
                runs[row["arm"]].append(row["curve"])
        if not runs:
            continue
        lines += [f"## {name}. {claim.title}", "", f"| arm | seeds | {' | '.join(COLUMNS.values())} |"]
        lines.append("| --- " * (len(COLUMNS) + 2) + "|")
        every = [curve for curves in runs.values() for curve in curves]
        seen = {json.dumps(curve[0]): curve[0] for curve in every}.values()  # starts of the same seed are one
        ends = {"before": list(seen)} | {arm: [curve[-1] for curve in curves] for arm, curves in runs.items()}
        for arm, values in ends.items():
            cells = [[end[column] for end in values if column in end] for column in COLUMNS]
            shown = " | ".join(interval(cell) if cell else "" for cell in cells)
            lines.append(f"| {arm} | {len(values)} | {shown} |")
        lines.append("")
        _draw(out / f"{name}.png", claim, runs)
    (out / "tables.md").write_text("\n".join(lines))


def _draw(path: Path, claim: Claim, runs: dict[str, list[list[dict]]]) -> None:
    """Each arm's mean score by truth, itself and its frozen start, with the seeds behind."""
    figure, axes = plt.subplots(1, len(runs), figsize=(3 * len(runs), 3), sharey=True, squeeze=False)
    for axis, (arm, curves) in zip(axes[0], runs.items(), strict=True):
        for name, colour in {"truth": "tab:green", "own": "tab:blue", "frozen": "tab:orange"}.items():
            points = defaultdict(list)
            for curve in curves:
                for row in curve:
                    if name in row:
                        points[row["steps"]].append(row[name])
            if points:
                axis.plot(list(points), [np.mean(values) for values in points.values()], colour, label=name)
                for step, values in points.items():
                    axis.plot([step] * len(values), values, ".", color=colour, alpha=0.4)
        axis.set(title=arm, xlabel="step")
    axes[0][0].set_ylabel("score of held-out answers")
    axes[0][0].legend()
    figure.suptitle(claim.title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", default=",".join(CLAIMS), help="letters of the claims")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10, help="seeds below it chose the settings")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    claims = args.claims.split(",")
    if unknown := set(claims) - set(CLAIMS):
        raise InputError(f"--claims: {sorted(unknown)} are not of {', '.join(CLAIMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out.resolve() / "programs"))
    results = args.out / "results.jsonl"
    rows = read_jsonl(results) if results.exists() else []
    done = {(row["claim"], row["arm"], row["seed"]) for row in rows}
    for name in claims:
        claim = CLAIMS[name]
        shared = [f"model={make_base(claim, args.out)}", *claim.recipe]
        if name == "d":
            lessons = args.out / "lessons.jsonl"
            shared += [f"data.teacher={lessons}"]
            if not lessons.exists():
                write_lessons(TrainConfig.load("configs/demo.yaml", shared))
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for arm, overrides in claim.arms.items():
                if (name, arm, seed) in done:
                    continue
                place = f"run_dir={args.out / name / arm.translate(PLAIN)}_{seed}"
                config = TrainConfig.load("configs/demo.yaml", [*shared, *overrides, f"seed={seed}", place])
                row = {"claim": name, "arm": arm, "seed": seed, "curve": run_arm(config)}
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                write_tables(args.out, rows)
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
