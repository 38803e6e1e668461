"""The paper's claims in the tiny world, where the truth is known: arms, seeds, tables and pictures.

    python scripts/study.py [--claims a,e] [--bases weak] [--seeds 5] [--out srrl_jax/tinyworld/study]

An arm is a recipe: the demo's with the claim's overrides and its own. Every finished run is a line of
OUT/results.jsonl, so the same command goes on where it was stopped; arms that claims share are run once, and
each seed goes through all arms before the next. The end of the README beside OUT, or OUT/tables.md where
there is none, has means over seeds and the half-widths of their 95% t-intervals. Training sees the oracle
only where an arm says so.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import jax
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from claims import BASES, CLAIMS, Claim
from demo import oracle_curve
from flax import nnx
from outside import examiner
from teacher_share import write_lessons

from srrl_jax import TrainConfig, train
from srrl_jax.checkpoints import load_model
from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem
from srrl_jax.parallel import make_mesh
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_pairs
from srrl_jax.tinyworld.harder import KINDS, draw_harder_row, harder_pairs, kind_of
from srrl_jax.tinyworld.rows import dump_rows, easy_rows, random_criterion
from srrl_jax.tinyworld.tokenizer import CHECKPOINT

COLUMNS = {
    "truth": "oracle score",
    "gain": "gain of score",
    "beside": "score beside the first arm",
    "own": "score by itself",
    "accuracy": "grader accuracy",
    "accuracy_gain": "gain of accuracy",
    "control": "met by empty answers",
    "unread": "unreadable verdicts",
    "warned": "runs warned",
    "length": "tokens",
    "grading": "grading's share of a step",
}
MORE = {
    "c": {"accuracy_item": "accuracy, items", "accuracy_style": "accuracy, style"},
    "b": {"seconds": "seconds of a step", "rollout": "rollout's share", "update": "update's share"},
    "i": {f"accuracy_{kind}": f"accuracy, {kind}" for kind in KINDS},
}
MARK = "<!-- scripts/study.py writes what follows, to the end -->\n"


def make_base(name: str, work: Path) -> Path:
    """The base, made where it is not there yet."""
    if not BASES[name]:
        return CHECKPOINT
    path = work / "bases" / name
    if not (path / "model.safetensors").exists():
        script = Path(__file__).with_name("make_tiny_model.py")
        subprocess.run([sys.executable, str(script), *BASES[name], "--out", str(path)], check=True)
    return path


def write_rows(work: Path) -> None:
    """The training rows with other rubrics: points of one size, foreign criteria, few, and harder ones."""
    rng, others = Random("rubrics"), Random("others")
    folder = work / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[dict]] = {"equal": [], "noisy": [], "foreign": [], "few": []}
    for row in easy_rows():
        rubrics = row["rubrics"]
        equal = [r | {"points": 5 if r["points"] > 0 else -5} for r in rubrics]
        noisy = [r | {"criterion": random_criterion(rng)} if rng.random() < 0.3 else r for r in rubrics]
        foreign = [r | {"criterion": random_criterion(others)} for r in rubrics]
        first = next(r for r in rubrics if r["points"] > 0)
        rest = [r for r in rubrics if r is not first]
        few = [first, *rng.sample(rest, (len(rubrics) + 1) // 2 - 1)]
        for name, changed in zip(made, (equal, noisy, foreign, few), strict=True):
            made[name].append(row | {"rubrics": changed})
    rng = Random("harder")
    made["harder"] = [draw_harder_row("easy", rng, f"harder-{i}") for i in range(400)]
    made["harder_hard"] = [draw_harder_row("hard", rng, f"harder-hard-{i}") for i in range(100)]
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text(dump_rows(rows))


def recipe(base: str, keys: tuple[str, ...], seed: int, work: Path, run_dir: Path) -> TrainConfig:
    """Of a run, with all files that it needs made."""
    places = {"work": work, "run": run_dir, "base": base}
    if any("{endpoint}" in key for key in keys):
        places["endpoint"] = open_endpoint()
    keys = [f"model={make_base(base, work)}", f"seed={seed}", f"run_dir={run_dir}", *keys]
    config = TrainConfig.load("configs/demo.yaml", [key.format(**places) for key in keys])
    if config.data.teacher and not Path(config.data.teacher).exists():
        write_lessons(config)
    if not Path(config.data.train).exists():
        write_rows(work)
    return config


@functools.cache
def open_endpoint() -> str:
    """The base_url of the outside grader in a process of its own, which ends with this one."""
    command = [sys.executable, str(Path(__file__).with_name("outside.py"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return server.stdout.readline().strip()


def exam(config: TrainConfig) -> tuple[tuple[str, ...], list, dict[str, list[bool]]]:
    """The keys that an arm's weights are examined with, the fixed verdicts, and which are of each kind.

    Asked in the demo's way whatever the arm; but as in training where verdicts are not written, and about the
    criteria of the harder world where that is trained in.
    """
    if Path(config.data.train).stem == "harder":
        pairs = harder_pairs()
        of = [kind_of(criterion.criterion) for *_, criterion, _ in pairs]
        keys = (f"data.train={config.data.train}", "grading.max_new_tokens=28")
        return keys, pairs, {kind: [each == kind for each in of] for kind in KINDS}
    g, pairs = config.grading, grader_pairs()
    style = [criterion.axis not in ("completeness", "accuracy") for *_, criterion, _ in pairs]
    written = g.verdict == "generate"
    keys = () if written else (f"grading.verdict={g.verdict}", f"grading.calibrate={g.calibrate}")
    return keys, pairs, {"item": [not each for each in style], "style": style}


@functools.cache
def _examiner(*keys: str):
    return examiner(load_model(CHECKPOINT), *keys)


def accuracies(params, config: TrainConfig) -> dict[str, float]:
    """Share of right verdicts of these weights on the `exam`, in all and by kind; unreadable is wrong."""
    keys, pairs, kinds = exam(config)
    items = [GradingItem(messages, response, [criterion]) for messages, response, criterion, _ in pairs]
    mesh, grader = _examiner(*keys)
    with jax.set_mesh(mesh):
        verdicts = grader.grade(params, items, jax.random.key(0))
    right = np.array([row[0].met is pair[-1] for row, pair in zip(verdicts, pairs, strict=True)])
    found = {f"accuracy_{kind}": float(right[chosen].mean()) for kind, chosen in kinds.items()}
    return {"accuracy": float(right.mean())} | found


_base_accuracies: dict[tuple, dict[str, float]] = {}


def base_accuracies(config: TrainConfig) -> dict[str, float]:
    """`accuracies` of a base, once."""
    if (key := (config.model, exam(config)[0])) not in _base_accuracies:
        with jax.set_mesh(make_mesh(config.mesh)):
            _base_accuracies[key] = accuracies(nnx.state(load_model(config.model)), config)
    return _base_accuracies[key]


def unreadable(samples: list[dict]) -> dict[int, float]:
    """Share of the policy's verdicts on held-out answers that count for nothing, at each evaluation."""
    verdicts = defaultdict(list)
    for row in samples:
        if row["split"] == "eval":
            verdicts[row["step"]] += [c["verdict"] is None for c in row["criteria"]]
    return {step: float(np.mean(values)) for step, values in verdicts.items()}


def run_arm(config: TrainConfig) -> dict:
    """Trains, and returns what is true at each evaluation, and the median seconds of a step's parts.

    The first and last evaluation have the grader's accuracy; `warned` are those that the monitor warned of.
    """
    final = train(config)
    run_dir = Path(config.run_dir)
    samples = read_jsonl(run_dir / "samples.jsonl")
    truth, unread = dict(oracle_curve(samples, "eval")), unreadable(samples)
    names = {
        "own": "eval/self",
        "frozen": "eval/frozen",
        "control": "grader/control_met_rate",
        "agreement": "grader/agreement_frozen",
        "length": "eval/mean_length",
    }
    events = read_jsonl(run_dir / "events.jsonl")
    keys = ("eval.margin", "eval.agreement", "eval.control_met")  # those that eval.stop_on_warning heeds
    warned = {e["step"] for e in events if any(key in e["message"] for key in keys)}
    curve = [
        {
            "steps": (step := row["step"]),
            "truth": truth[step],
            "warned": step in warned,
            "unread": unread[step],
        }
        | {short: row[name] for short, name in names.items() if row.get(name) is not None}
        for row in read_jsonl(run_dir / "metrics.jsonl")
        if "eval/self" in row
    ]
    curve[0] |= base_accuracies(config)
    curve[-1] |= accuracies(final.params, config)
    steps = [row for row in read_jsonl(run_dir / "timings.jsonl") if row["step"] > 0]
    parts = ("rollout", "grade", "update")
    return {
        "curve": [{k: round(v, 4) for k, v in row.items()} for row in curve],
        "times": {part: round(float(np.median([row[f"time/{part}"] for row in steps])), 2) for part in parts},
    }


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half-width of its 95% t-interval; the mean alone of one value."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values):.{digits}f}"


def finished(claim: Claim, base: str, rows: list[dict]) -> dict[str, list[list[dict]]]:
    """The curves of each arm that has any, by seed."""
    runs = {}
    for arm, keys in claim.arms.items():
        wanted = [base, [*claim.recipe, *keys]]
        found = sorted((row for row in rows if [row["base"], row["keys"]] == wanted), key=lambda r: r["seed"])
        for row in found:
            seconds = sum((times := row["times"]).values())
            shares = {"rollout": times["rollout"], "grading": times["grade"], "update": times["update"]}
            shares = {part: value / seconds for part, value in shares.items()} | {"seconds": seconds}
            start, *between, end = row["curve"]
            curve = [start | {"seed": row["seed"]}, *between, end | shares]
            runs.setdefault(arm, []).append(curve)
    return runs


def until_warned(curve: list[dict]) -> list[dict]:
    """What `eval.stop_on_warning` would have left of a run: it is the same to the bit up to there."""
    end = next((i for i, row in enumerate(curve) if row["warned"] and i), len(curve) - 1)
    return curve[: end + 1]


def compared(runs: dict[str, list[list[dict]]]) -> dict[str, list[dict]]:
    """Where the seeds began, as "before", and where each arm ended, with what it gained.

    `beside` is the score less that of the first arm with the same seed.
    """
    before, first = {}, {}  # by seed
    ends: dict[str, list[dict]] = {"before": []}
    for place, (arm, curves) in enumerate(runs.items()):
        ends[arm] = []
        for curve in curves:
            (start, *_, end), seed = curve, curve[0]["seed"]
            before.setdefault(seed, {name: start[name] for name in start if name != "warned"})
            more = {"gain": end["truth"] - start["truth"], "warned": any(row["warned"] for row in curve)}
            if "accuracy" in end:
                more["accuracy_gain"] = end["accuracy"] - start["accuracy"]
            if place == 0:
                first[seed] = end["truth"]
            elif seed in first:
                more["beside"] = end["truth"] - first[seed]
            ends[arm].append(end | more)
    return ends | {"before": list(before.values())}


def table(runs: dict[str, list[list[dict]]], columns: dict[str, str] = COLUMNS) -> Iterator[str]:
    """Lines of what is `compared`, with the columns that have anything."""
    arms = compared(runs)
    there = {column for ends in arms.values() for end in ends for column in end}
    columns = {column: title for column, title in columns.items() if column in there}
    yield f"| arm | seeds | {' | '.join(columns.values())} |"
    yield "| --- " * (len(columns) + 2) + "|"
    for arm, ends in arms.items():
        cells = []
        for column in columns:
            found = [end[column] for end in ends if column in end]
            if not found:
                cells.append("")
            elif column == "warned":
                cells.append(str(sum(found)))
            else:
                cells.append(interval(found, 1 if column == "length" else 3))
                if len(found) < len(ends):  # the others' verdicts could not be read
                    cells[-1] += f" (of {len(found)})"
        shown = " | ".join(cells)
        yield f"| {arm} | {len(ends)} | {shown} |"


def write_tables(out: Path, rows: list[dict]) -> None:
    """The tables and a picture of each claim, of the runs so far; see the top of this file."""
    lines = []
    for name, claim in CLAIMS.items():
        for base in claim.bases:
            runs = finished(claim, base, rows)
            if len(runs) < 2:  # nothing to compare
                continue
            if name == "e" and "no guard" in runs:
                runs["stop on warning"] = [until_warned(curve) for curve in runs["no guard"]]
            columns = COLUMNS | MORE.get(name, {})
            lines += [f"### {name}. {claim.title}: {base} base", "", *table(runs, columns), ""]
            _draw(out / f"{name}_{base}.png", f"{name}, {base} base", runs)
            lines += [f"![{name}, {base} base]({out.name}/{name}_{base}.png)", ""]
    text, readme = "\n".join(lines), out.parent / "README.md"
    if readme.exists() and MARK in (old := readme.read_text()):
        readme.write_text(old[: old.index(MARK)] + MARK + "\n" + text)
    else:
        (out / "tables.md").write_text(text.replace(f"({out.name}/", "("))


def _draw(path: Path, title: str, runs: dict[str, list[list[dict]]]) -> None:
    """Each arm's mean score by truth, itself and its frozen start, with the seeds behind."""
    figure, axes = plt.subplots(1, len(runs), figsize=(2.4 * len(runs), 2.6), sharey=True, squeeze=False)
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
        axis.set_title(arm, fontsize=9)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("score of held-out answers")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", default=",".join(CLAIMS), help="letters of the claims")
    parser.add_argument("--bases", default=",".join(BASES), help="those of the claims to run on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10, help="seeds below it chose the settings")
    parser.add_argument("--out", type=Path, default=CHECKPOINT.parent / "study", help="results and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="bases and runs")
    args = parser.parse_args()
    claims, bases = (list(filter(None, given.split(","))) for given in (args.claims, args.bases))
    for option, given, known in (("claims", claims, CLAIMS), ("bases", bases, BASES)):
        if unknown := {*given} - {*known}:
            raise InputError(f"--{option}: {sorted(unknown)} are not of {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.work.resolve() / "programs"))
    results = args.out / "results.jsonl"
    rows = read_jsonl(results) if results.exists() else []
    write_tables(args.out, rows)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in claims:
            claim = CLAIMS[name]
            wanted = [base for base in claim.bases if base in bases]
            for base, (arm, keys) in ((b, a) for b in wanted for a in claim.arms.items()):
                run = {"base": base, "keys": [*claim.recipe, *keys], "seed": seed}
                if any(run.items() <= row.items() for row in rows):
                    continue
                place = args.work / "runs" / f"{name}_{base}_{arm.replace(' ', '_')}_{seed}"
                start = time.time()
                rows.append(run | run_arm(recipe(base, run["keys"], seed, args.work, place)))
                print(f"{name} {base} {arm} {seed}: {time.time() - start:.0f} s", flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                write_tables(args.out, rows)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
