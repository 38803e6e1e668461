"""A run whose grader is hacked, under the eyes of the monitor and of the oracle.

    python scripts/make_tiny_model.py --steps 250 --out runs/weak        # a base that grades badly
    python scripts/hacking.py model=runs/weak [key=value ...]

The recipe is the demo's, at ten times its learning rate and without a hold to the starting weights. The table
sets what the policy and its frozen start give to held-out answers beside what is true of them, which
the run does not see.
"""

import sys
from pathlib import Path

from demo import oracle_curve
from rich.console import Console
from rich.table import Table

from srrl_jax import TrainConfig, train
from srrl_jax.errors import InputError
from srrl_jax.telemetry import read_jsonl
from srrl_jax.viewer.report import write_report

HACKED = [
    "run_dir=runs/hacked",
    "kl_coef=0",
    "optimizer.learning_rate=1e-3",
    "steps=12",
    "eval.every=3",
    "eval.rows=48",
]
COLUMNS = {
    "eval/self": "by itself",
    "eval/frozen": "by its frozen start",
    "oracle": "oracle",
    "grader/agreement_frozen": "agreement with frozen",
    "eval/met_rate_negative": "met, negative criteria",
    "eval/saturated_met": "saturated",
    "eval/mean_length": "tokens",
}

WARNED_BY = ("eval.margin", "eval.agreement")


def main() -> None:
    config = TrainConfig.load("configs/demo.yaml", HACKED + sys.argv[1:])
    run_dir = Path(config.run_dir)
    train(config)

    curve = oracle_curve(read_jsonl(run_dir / "samples.jsonl"), "eval")
    truth = dict(curve)
    events = read_jsonl(run_dir / "events.jsonl")
    warned = {row["step"] for row in events if any(key in row["message"] for key in WARNED_BY)}
    table = Table(title="Held-out answers")
    for column in ("step", *COLUMNS.values(), "warning"):
        table.add_column(column, justify="right")
    for row in read_jsonl(run_dir / "metrics.jsonl"):
        if "eval/self" in row:
            row["oracle"] = truth[row["step"]]
            cells = ["–" if row[name] is None else f"{row[name]:.3f}" for name in COLUMNS]
            table.add_row(str(row["step"]), *cells, "yes" if row["step"] in warned else "")
    Console().print(table)
    print(f"report: {write_report(run_dir, curves={'oracle score (held-out)': curve})}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"hacking: {error}", file=sys.stderr)
        sys.exit(2)
