"""What the page and the report ask of an index: each question is a function of the parameters in a link.

A link's parameters are strings. `run` names a run. Samples are chosen by `step`, `reward`, `tokens` (a
number, or "a..b", open at either end), `split`, `prompt`, `theme`, `truncated` ("yes", "no") and `text`;
their verdicts by `criterion` (its key), `axis` and `verdict` ("met", "unmet", "unscorable", "differ").
"""

from collections.abc import Callable, Mapping

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry.curves import CHARTS, TILES
from srrl_jax.telemetry.run_log import PHASES, read_metrics
from srrl_jax.viewer.index import JUDGES, Index
from srrl_jax.viewer.labels import read_labels, scores

Params = Mapping[str, str]

PAGE = 50
MOST_CRITERIA = 3000
BINS = 16  # of the steps, in the small curves of criteria
ROW = (
    "id, step, split, prompt_id, sample, theme, reward, advantage, tokens, truncated, head, differ, points, "
    + ", ".join(JUDGES)
)
SORTS = ("id", "step", "reward", "advantage", "tokens", "differ")
_RUN = "run = ?"
_VERDICTS = {"met": "self = 1", "unmet": "self = 0", "unscorable": "self IS NULL", "differ": "differ"}
# Those with which a grader disagrees first, then the others, in an order that looks random and stays.
_PLACE = "((hash(id * 1000 + k) >> 2)::BIGINT + CASE WHEN differ THEN 0 ELSE 1::BIGINT << 62 END)"


def state(index: Index, params: Params) -> dict:
    """What a page polls: how far each run is; `version` grows when anything changed."""
    runs = [
        {"name": run.name, "version": run.version, "samples": run.samples, "progress": run.progress}
        for run in index.runs
    ]
    return {"runs": runs, "fault": index.fault, "version": sum(run["version"] for run in runs)}


def options(index: Index, params: Params) -> dict:
    """What the filters can be set to, and the text of the `criterion` that is chosen."""
    run = index.run(params.get("run", ""))
    found = {}
    for name, table in (("split", "samples"), ("theme", "samples"), ("axis", "verdicts")):
        sql = f"SELECT DISTINCT {name} AS value FROM {table} WHERE run = ? AND {name} <> '' ORDER BY 1"
        found[name] = [row["value"] for row in index.ask(sql, [run])]
    counts = ", ".join(f"count({name}) AS {name}" for name in JUDGES)
    (judges,) = index.ask(f"SELECT {counts} FROM samples WHERE run = ?", [run])
    text = index.ask("SELECT text FROM criteria WHERE criterion = ?", [params.get("criterion", "")])
    chosen = text[0]["text"] if text else ""
    return found | {"judges": [name for name, n in judges.items() if n], "criterion": chosen}


def overview(index: Index, params: Params) -> dict:
    """Curves, warnings, the time of a step and the recipe of one run."""
    number = index.run(params.get("run", ""))
    run = index.runs[number]
    metrics = read_metrics(run.folder) if run.logs[0] else []
    names = [
        *(key for chart in CHARTS for key in chart.lines),
        *TILES,
        *(f"time/{phase}" for phase in PHASES),
    ]
    curves = {
        name: curve
        for name in dict.fromkeys(names)
        if (curve := [(row["step"], row[name]) for row in metrics if row.get(name) is not None])
    }
    config = run.folder / "config.yaml"
    warned = dict.fromkeys((e["step"], e["message"]) for e in run.events() if e["event"] == "warning")
    return {
        "charts": CHARTS,
        "tiles": TILES,
        "curves": curves | axis_curves(index, number),
        "warnings": list(warned),
        "phases": PHASES,
        "recipe": _flat(storage.read_yaml(config)) if config.is_file() else {},
    }


def axis_curves(index: Index, run: int) -> dict[str, list[tuple[int, float]]]:
    """{"axis/NAME": [(step, score)]}: points met over positive points of an axis, in training's answers."""
    found: dict[str, list] = {}
    for row in index.ask(
        "SELECT axis, step, sum(points * self) / sum(greatest(points, 0)) AS score FROM verdicts"
        " WHERE run = ? AND split = 'train' AND axis <> '' AND self IS NOT NULL"
        " GROUP BY axis, step ORDER BY axis, step",
        [run],
    ):
        if row["score"] is not None:
            found.setdefault(f"axis/{row['axis']}", []).append((row["step"], row["score"]))
    return found


def samples(index: Index, params: Params) -> dict:
    """A page of the samples that the parameters choose, in the order of `sort` ("-" in front: falling)."""
    where, values = sample_filter(index, params)
    verdicts, more = verdict_filter(params)
    if verdicts:
        where += f" AND id IN (SELECT id FROM verdicts WHERE run = ? AND {verdicts})"
        values += [values[0], *more]
    sort = params.get("sort") or "-id"
    if sort.lstrip("-") not in SORTS:
        raise InputError(f"sort: {sort} is none of {', '.join(SORTS)}")
    order = f"{sort.lstrip('-')} {'DESC' if sort[0] == '-' else 'ASC'} NULLS LAST, id"
    page = int(params.get("page") or 0)
    found = (  # without the texts, which are then fetched for one page alone
        f"SELECT id, count(*) OVER () AS total, avg(reward) OVER () AS mean FROM samples"
        f" WHERE {where} ORDER BY {order} LIMIT {PAGE} OFFSET {page * PAGE}"
    )
    rows = index.ask(
        f"SELECT {ROW}, total, mean FROM samples JOIN ({found}) USING (id) WHERE run = ? ORDER BY {order}",
        [*values, values[0]],
    )
    total, mean = (rows[0]["total"], rows[0]["mean"]) if rows else (0, None)
    return {"rows": rows, "total": total, "mean": mean, "size": PAGE}


def sample(index: Index, params: Params) -> dict:
    """The sample `open`, whole, with its group and what else was sampled for its prompt."""
    run, id = index.run(params.get("run", "")), int(params["open"])
    row = index.row(run, id)
    same = index.ask(
        f"SELECT {ROW} FROM samples WHERE run = ? AND prompt_id = ? AND split = ? ORDER BY step, id",
        [run, row["prompt_id"], row["split"]],
    )
    keys = index.ask("SELECT criteria FROM samples WHERE run = ? AND id = ?", [run, id])[0]["criteria"]
    marks = [label for label in read_labels(index.runs[run].folder) if _place(label) == _place(row)]
    return {"row": row, "same": same, "keys": keys, "labels": {m["criterion"]: m["label"] for m in marks}}


def criteria(index: Index, params: Params) -> dict:
    """How each criterion behaves, or each axis or theme (`by`); those to repair first come first.

    `alike` is the share of groups in which it tells no answer from another, `length` the correlation of
    being met with tokens, the column of another judge the share of verdicts that are its own too. `repair`
    adds up what is wrong (unscorable, alike, disagreement, size of the correlation), less for fewer verdicts.
    """
    by = params.get("by") or "criterion"
    if by not in ("criterion", "axis", "theme"):
        raise InputError(f"by: {by} is none of criterion, axis, theme")
    chosen, values = both_filters(index, params)
    shares = ", ".join(f"avg((self = {name})::INT) AS {name}" for name in JUDGES[1:])
    disagreement = " + ".join(f"coalesce(1 - {name}, 0)" for name in JUDGES[1:])
    rows = index.ask(
        f"""
        WITH chosen AS (SELECT *, {by} AS name FROM verdicts WHERE {chosen} AND {by} <> ''),
        bounds AS (SELECT min(step) AS low, greatest(max(step) - min(step) + 1, 1) AS size FROM chosen),
        alike AS (SELECT name, avg(CASE WHEN same THEN 1.0 ELSE 0.0 END) AS alike FROM (
            SELECT name, min(self) = max(self) AS same FROM chosen
            GROUP BY name, criterion, step, split, prompt_id HAVING count(self) > 1) GROUP BY name),
        curves AS (SELECT name, list([bin, met] ORDER BY bin) AS curve FROM (
            SELECT name, (step - low) * {BINS} // size AS bin, avg(self) AS met FROM chosen, bounds
            WHERE self IS NOT NULL GROUP BY ALL) GROUP BY name),
        totals AS (SELECT name, min(axis) AS axis, count(*) AS n, min(points) AS low, max(points) AS high,
            avg(self) AS met, 1 - count(self) / count(*) AS unscorable, corr(self, tokens) AS length,
            {shares} FROM chosen GROUP BY name)
        SELECT totals.*, alike, curve, text, count(*) OVER () AS total,
            (unscorable + coalesce(alike, 0) + {disagreement}
             + coalesce(CASE WHEN isnan(length) THEN 0 ELSE abs(length) END, 0)) * n / (n + 8) AS repair
        FROM totals LEFT JOIN alike USING (name) LEFT JOIN curves USING (name)
            LEFT JOIN criteria ON criteria.criterion = totals.name
        ORDER BY repair DESC, name LIMIT {MOST_CRITERIA}""",
        values,
    )
    return {"rows": rows, "total": rows[0]["total"] if rows else 0, "by": by}


def compare(index: Index, params: Params) -> dict:
    """Mean reward of the prompts that all runs have, those on which they differ most first.

    Without `step`, held-out answers are those of the last step at which every run was evaluated.
    """
    split, step = params.get("split") or "eval", params.get("step", "")
    if split == "eval" and not step:
        last = index.ask("SELECT max(step) AS step FROM samples WHERE split = ? GROUP BY run", [split])
        step = str(min(row["step"] for row in last)) if last else ""
    within, values = _between("step", step)
    rows = index.ask(
        f"""
        WITH means AS (SELECT run, prompt_id, avg(reward) AS mean, max(id) AS newest FROM samples
            WHERE split = ? AND {within} GROUP BY run, prompt_id)
        SELECT prompt_id, min(prompts.head) AS head, list(mean ORDER BY run) AS means,
            list(newest ORDER BY run) AS ids, max(mean) - min(mean) AS spread
        FROM means JOIN prompts USING (prompt_id) GROUP BY prompt_id HAVING count(mean) = ?
        ORDER BY spread DESC, prompt_id LIMIT 200""",
        [split, *values, len(index.runs)],
    )
    return {"rows": rows, "split": split, "step": step}


def label(index: Index, params: Params) -> dict:
    """The verdict (`open`, `k`), or the first without a mark, and the next one without; scores of the judges.

    Verdicts are chosen as samples are; those on which judges disagree come first.
    """
    run = index.run(params.get("run", ""))
    chosen, values = both_filters(index, params)
    labels = read_labels(index.runs[run].folder)
    done = {(*_place(row), row["criterion"]) for row in labels}
    after, here = "true", None
    if params.get("open"):
        here = {"id": int(params["open"]), "k": int(params.get("k") or 0)}
        after = f"{_PLACE} > (SELECT {_PLACE} FROM verdicts WHERE run = {run} AND id = ? AND k = ?)"
    queue = index.ask(
        f"""SELECT id, k, step, split, prompt_id, samples.sample, criteria.text AS criterion FROM
            (SELECT id, k, criterion, {_PLACE} AS place FROM verdicts WHERE {chosen} AND {after}
             ORDER BY place LIMIT {len(labels) + 2})
            JOIN samples USING (id) JOIN criteria USING (criterion) WHERE samples.run = ? ORDER BY place""",
        [*values, *(here.values() if here else ()), run],
    )
    open_ones = [row for row in queue if (*_place(row), row["criterion"]) not in done]
    if here is None and open_ones:
        first = open_ones.pop(0)
        here = {"id": first["id"], "k": first["k"]}
    coming = {"id": open_ones[0]["id"], "k": open_ones[0]["k"]} if open_ones else None
    shown = sample(index, {"run": params.get("run", ""), "open": str(here["id"])}) if here else {}
    return shown | {
        "here": here,
        "next": coming,
        "labelled": sum(row["label"] is not None for row in labels),
        "scores": scores(labels),
    }


QUERIES: dict[str, Callable[[Index, Params], dict]] = {
    f.__name__: f for f in (state, options, overview, samples, sample, criteria, compare, label)
}


def sample_filter(index: Index, params: Params) -> tuple[str, list]:
    """A condition on `samples` and its values, the first of which is the run. Raises InputError."""
    run = index.run(params.get("run", ""))
    parts, values = [_RUN], [run]
    for name, column in (("split", "split"), ("prompt", "prompt_id"), ("theme", "theme")):
        if params.get(name):
            parts.append(f"{column} = ?")
            values.append(params[name])
    for name in ("step", "reward", "tokens"):
        if params.get(name):
            part, more = _between(name, params[name])
            parts.append(part)
            values += more
    if params.get("truncated"):
        parts.append("truncated = ?")
        values.append(params["truncated"] == "yes")
    if params.get("text"):
        parts.append(
            "(contains(text, ?) OR prompt_id IN"
            " (SELECT prompt_id FROM prompts WHERE contains(lower(prompts.text), ?)))"
        )
        values += [params["text"].lower()] * 2
    return " AND ".join(parts), values


def both_filters(index: Index, params: Params) -> tuple[str, list]:
    """A condition on `verdicts` that holds the one on their samples too, lessons apart; and its values."""
    where, values = sample_filter(index, params)
    verdicts, more = verdict_filter(params)
    parts = ["run = ?", "split <> 'lesson'", *([verdicts] if verdicts else [])]
    if where != _RUN:
        parts.append(f"id IN (SELECT id FROM samples WHERE {where})")
        more += values
    return " AND ".join(parts), [values[0], *more]


def verdict_filter(params: Params) -> tuple[str, list]:
    """A condition on `verdicts` and its values; "" for none. Raises InputError."""
    named = {name: params[name] for name in ("criterion", "axis") if params.get(name)}
    parts = [f"{name} = ?" for name in named]
    if verdict := params.get("verdict"):
        if verdict not in _VERDICTS:
            raise InputError(f"verdict: {verdict} is none of {', '.join(_VERDICTS)}")
        parts.append(_VERDICTS[verdict])
    return " AND ".join(parts), list(named.values())


def _between(column: str, wanted: str) -> tuple[str, list]:
    low, dots, high = wanted.partition("..")
    try:
        bounds = [float(end) if end else None for end in (low, high if dots else low)]
    except ValueError:
        raise InputError(f'{column}: {wanted} must be a number, or "a..b"') from None
    parts = [f"{column} {sign} ?" for sign, end in zip((">=", "<="), bounds, strict=True) if end is not None]
    return " AND ".join(parts) or "true", [end for end in bounds if end is not None]


def _place(row: Mapping) -> tuple:
    return row["step"], row["split"], row["prompt_id"], row["sample"]


def _flat(value: object, name: str = "") -> dict[str, str]:
    """A recipe as {"loss.ratio": "token", ...}."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()
    }
