"""What a person marks: RUN/labels.jsonl, in the schema that `srrl meta-evaluate` reads."""

import json
import threading

from etils import epath

from srrl_jax import storage
from srrl_jax.telemetry.run_log import read_jsonl
from srrl_jax.viewer.index import JUDGES, Index

_lock = threading.Lock()


def read_labels(folder: epath.Path) -> list[dict]:
    """The rows of a run's labels.jsonl, of which there may be none."""
    path = folder / "labels.jsonl"
    return read_jsonl(path) if path.exists() else []


def mark(index: Index, run: int, id: int, k: int, label: bool | None) -> dict[str, dict]:
    """Writes down whether criterion `k` of a sample is met, in place of an earlier mark; None is unsure.

    Returns `scores` of the marks that are there now.
    """
    row = index.row(run, id)
    criterion = row["criteria"][k]
    where = {name: row[name] for name in ("step", "split", "prompt_id", "sample")}
    where["criterion"] = criterion["criterion"]
    new = {"prompt": row["prompt"], "completion": row["response"], **where, "points": criterion["points"]}
    axis = next((tag for tag in criterion.get("tags") or () if tag.startswith("axis:")), "")
    judges = {"self": criterion["verdict"]} | {name: criterion[name] for name in JUDGES if name in criterion}
    new |= {"label": label, "category": axis, "judges": judges}
    folder = index.runs[run].folder
    with _lock:
        rows = [old for old in read_labels(folder) if {name: old[name] for name in where} != where]
        lines = (json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in [*rows, new])
        storage.replace(folder / "labels.jsonl", lines)
    return scores([*rows, new])


def scores(labels: list[dict]) -> dict[str, dict]:
    """{judge: its F1 of met, of not met, their mean, and the number of marks} against marks that are sure."""
    from srrl_jax.evaluation.agreement import agreement, grader_pairs  # whose room imports JAX

    labels = [row for row in labels if row["label"] is not None]
    names = dict.fromkeys(name for row in labels for name in row["judges"])
    found = {}
    for name in names:
        rows = [row for row in labels if name in row["judges"]]
        pairs = grader_pairs([row["judges"][name] for row in rows], [[row["label"]] for row in rows])
        agreed = agreement(pairs)
        found[name] = {"met": agreed.f1_met, "unmet": agreed.f1_not_met}
        found[name] |= {"balanced": agreed.f1_balanced, "n": agreed.n}
    return found
