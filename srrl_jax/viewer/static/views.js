// The five views: each turns the parameters of the address into an element.
"use strict";

const SORTS = {
  "-step": "step ↓", step: "step ↑", "-reward": "reward ↓", reward: "reward ↑", "-tokens": "length ↓", tokens: "length ↑",
  "-advantage": "advantage ↓", advantage: "advantage ↑", "-differ": "disagreement ↓",
};

const openIn = (row) => change({ open: row.id, beside: "", k: "" });

// Overview

async function overview(params) {
  const [data, other] = await Promise.all([ask("overview", params), params.other ? ask("overview", { run: params.other }) : null]);
  return h("div", curves(data), recipe(data.recipe, other && other.recipe, params));
}

function recipe(mine, other, params) {
  const names = Object.keys({ ...mine, ...other }), run = params.run || RUNS[0].name;
  if (!names.length) return null;
  const differing = names.filter((name) => other && mine[name] !== other[name]);
  const columns = [["", "key", "", (name) => name, "left mono"], ["", run, "", (name) => mine[name] ?? "–", "left mono"]];
  if (other) columns.push(["", params.other, "", (name) => other[name] ?? "–", "left mono"]);
  return h("section", h("h2", "Recipe"),
    RUNS.length > 1 && h("div.filters",
      choose("other", "Difference to", RUNS.map((one) => one.name).filter((name) => name !== run)),
      other && h("a", { href: change({ all: params.all ? "" : "1" }) },
        params.all ? `only the ${differing.length} that differ` : `all ${names.length} keys`)),
    h("details", { open: Boolean(other) },
      h("summary", other ? `${differing.length} of ${names.length} keys differ` : `${names.length} keys`),
      table(columns, other && !params.all ? differing : names, {})));
}

// Samples

async function filters(params, sorted) {
  const known = await ask("options", { run: params.run, criterion: params.criterion });
  const chip = params.criterion && h("a.chip", { href: filtered({ criterion: "" }), title: "Remove this filter" },
    `× ${known.criterion || params.criterion}`);
  return h("div.filters",
    type("text", "Text", "in prompt, answer, reasons", 20), type("step", "Step", "3 or 1..9", 6),
    choose("split", "Split", known.split), type("prompt", "Prompt", "its id", 7), type("reward", "Reward", "0.2..0.6", 7),
    type("tokens", "Length", "..200", 6), choose("truncated", "Truncated", ["yes", "no"]),
    known.theme.length > 0 && choose("theme", "Theme", known.theme), known.axis.length > 0 && choose("axis", "Axis", known.axis),
    choose("verdict", "Verdict", Object.keys(VERDICTS), (key) => VERDICTS[key]),
    sorted && choose("sort", "Sort", Object.keys(SORTS), (key) => SORTS[key] || key, "newest"), chip);
}

function strip(row) {
  const met = [...row.self].filter((m) => m === "1").length;
  return h("span.strip", { title: `${met} of ${row.self.length} criteria met${row.differ ? `; judges differ on ${row.differ}` : ""}` },
    [...row.self].map((m, k) => h("i", { class: `${STATE[m]} ${signOf(row.points[k])} ${differs(row, k) ? "differ" : ""}` })));
}

async function samples(params) {
  const [bar, list, opened, other] = await Promise.all([filters(params, true), ask("samples", params),
    params.open ? ask("sample", params) : null, params.beside ? ask("sample", { ...params, open: params.beside }) : null]);
  const last = Math.max(0, Math.ceil(list.total / list.size) - 1), page = Number(params.page || 0);
  const columns = [
    ["step", "step", "", (row) => row.step],
    ["", "split", "", (row) => row.split, "left wide"],
    ["reward", "reward", "", (row) => h("a", { href: openIn(row) }, number(row.reward))],
    ["advantage", "adv.", "Reward relative to the group", (row) => number(row.advantage), "wide"],
    ["tokens", "tokens", "", (row) => [number(row.tokens), row.truncated && h("b.doubt", { title: "truncated" }, " ✂")], "wide"],
    ["differ", "criteria", "Green: met; red: met, and points are lost; amber: unscorable; underlined: judges differ", strip, "left"],
    ["", "answer", "", (row) => row.head || nothing(), "left text"],
  ];
  const rows = table(columns, list.rows, { sort: params.sort || "",
    attributes: (row) => ({ class: String(row.id) === params.open && "on", "data-open": openIn(row) }) });
  const pages = h("div.pages",
    h("span", `${list.total.toLocaleString("en")} samples, mean reward ${number(list.mean)}`),
    page > 0 && h("a", { href: change({ page: page - 1 || "" }) }, "← previous page"),
    last > 0 && h("span", `page ${page + 1} of ${last + 1}`),
    page < last && h("a", { href: change({ page: page + 1 }) }, "next page →"));
  return h("div", { class: opened ? "split opened" : "split" },
    h("section.list", bar, list.total ? [pages, rows]
      : empty("No sample is like that", "Take a filter away, or wait: this page follows the run.")),
    opened && h("section.detail", { id: "detail" }, detail(opened, other, params)));
}

function detail(data, other, params) {
  const { row } = data, steps = Map.groupBy(data.same, (sibling) => sibling.step), group = steps.get(row.step);
  const history = [...steps].flatMap(([step, rows]) => {
    const known = rows.map((one) => one.reward).filter((reward) => reward !== null);
    return known.length ? [[step, mean(known)]] : [];
  });
  const dot = (one) => {
    const state = String(one.id) === params.open ? "on" : String(one.id) === params.beside ? "beside" : "";
    return h("a", { class: `chip ${state}`, href: openIn(one), title: `advantage ${signed(one.advantage)}, ${one.tokens} tokens` },
      `#${one.sample} `, h("b", number(one.reward)));
  };
  const beside = h("select", { id: "f-beside", onchange: (event) => go(change({ beside: event.target.value })) },
    h("option", { value: "" }, "none"),
    group.filter((one) => one.id !== Number(params.open)).map((one) =>
      h("option", { value: one.id, selected: String(one.id) === params.beside }, `#${one.sample}, ${number(one.reward)}`)));
  const shown = (of, id) => answer(of.row, (_, k) => judged(of, k, id, params));
  return [
    h("div.head", h("a.close", { href: change({ open: "", beside: "" }), title: "Esc" }, "✕"),
      h("h2", `Step ${row.step}, ${row.split}, sample ${row.sample}`),
      h("a", { href: link("samples", { run: params.run, prompt: row.prompt_id, sort: "step" }) }, row.prompt_id)),
    group.length > 1 && h("p.group", h("span.muted", "Group "), group.map(dot), h("label", h("span", "beside"), beside)),
    conversation(row),
    h("div", { class: other && "pair" }, shown(data, params.open), other && shown(other, params.beside)),
    steps.size > 1 && h("section", h("h3", "This prompt over the steps"),
      lineChart("Mean reward", "", [{ label: "of its answers", colour: 0, points: history }]),
      h("ul.history", [...steps].map(([step, rows]) => h("li", h("b", `step ${step}`), h("span", rows.map(dot)),
        h("p", (rows.find((one) => one.sample === row.sample) || rows[0]).head))))),
  ];
}

// The list item of a sample's criterion `k`, with links.
function judged(data, k, id, params) {
  const { row, keys, labels } = data, item = row.criteria[k], label = labels[item.criterion];
  const drawn = criterion(item,
    h("a.plain", { href: change({ criterion: keys[k], page: "" }), title: "All samples with this criterion" }, item.criterion),
    label !== undefined && h("span.label", `a person: ${label === null ? "unsure" : label ? "met" : "not met"}`),
    here().view !== "label" && h("a.muted", { href: link("label", { run: params.run, open: id, k }) }, "label"));
  drawn.classList.toggle("on", params.criterion === keys[k]);
  return drawn;
}

// Criteria

async function criteria(params) {
  const { run, by, split } = params, [known, data] = await Promise.all([ask("options", { run }), ask("criteria", { run, by, split })]);
  const wanted = (params.text || "").toLowerCase(), sort = params.sort || "-repair", key = sort.replace("-", ""), way = sort[0] === "-" ? -1 : 1;
  const rows = data.rows.filter((row) => (row.text || row.name).toLowerCase().includes(wanted));
  rows.sort((a, b) => (a[key] === null) - (b[key] === null) || way * (a[key] - b[key]));
  const name = (row) => h("a.plain", { href: link("samples", { run, [data.by]: row.name, split }) }, row.text || row.name);
  const more = ["", "", "", (row) => data.by === "criterion" && h("a", { href: link("label", { run, criterion: row.name }) }, "label")];
  return h("div", h("div.filters",
    h("span.switch", ["criterion", "axis", "theme"].map((name) =>
      h("a", { class: data.by === name && "on", href: change({ by: name, text: "", sort: "" }) }, `by ${name}`))),
    choose("split", "Split", known.split), type("text", "Text", "in the criterion", 20),
    h("span.muted", `${rows.length} of ${data.total}, those to repair first on top`)),
  rows.length ? criteriaTable(rows.slice(0, 200), data.by, known.judges, sort, name, [more])
    : empty(`Nothing by ${data.by}`, "The samples carry no such tag, or none was graded yet."));
}

// Compare

async function compare(params) {
  if (RUNS.length < 2) return empty("One run is here", "Give two or more: srrl view RUN OTHER. Their curves then share a chart, " +
    "and the prompts on which they differ most come first.");
  const names = RUNS.map((run) => run.name);
  const [data, ...runs] = await Promise.all([ask("compare", params), ...names.map((run) => ask("overview", { run }))]);
  const { rows, split, step } = data;
  const [rewards, ...others] = runs[0].charts.map(([, , fraction, lines]) => Object.entries(lines).map(([key, label]) =>
    lineChart(label, "", runs.map((run, colour) => ({ label: names[colour], colour, points: run.curves[key] || [] })), fraction)));
  const columns = [["", "prompt", "", (row) => row.head, "left text"],
    ...names.map((run, i) => ["", run, "Opens the newest answer", (row) =>
      h("a", { href: link("samples", { run, prompt: row.prompt_id, split, step, open: row.ids[i] }) }, number(row.means[i]))]),
    ["", "apart", "", (row) => number(row.spread)]];
  return h("div", h("h2", "Rewards"), h("div.charts", rewards),
    h("h2", `Prompts on which they differ most, ${split === "eval" ? "held-out" : split}${step ? `, step ${step}` : ""}`),
    h("div.filters", choose("split", "Split", ["train"], undefined, "held-out"), !EXPORT && type("step", "Step", "3 or 1..9", 6)),
    rows.length ? table(columns, rows, {})
      : empty("No prompt in common", "Runs are compared on the prompts that all of them have answered."),
    h("h2", "Other curves"), h("div.charts", others));
}

// Label

function scoreTable(data) {
  const judges = Object.entries(data.scores);
  const columns = [["", "judge", "", ([name]) => name, "left"], ["", "F1", "Mean of the next two", ([, s]) => number(s.balanced)],
    ["", "met", "F1 of met", ([, s]) => number(s.met)], ["", "not met", "F1 of not met", ([, s]) => number(s.unmet)],
    ["", "n", "", ([, s]) => s.n]];
  return h("section.panel.score", h("h3", `${data.labelled} marked in labels.jsonl`), judges.length ? table(columns, judges, {})
    : h("p.muted", "The judges' F1 against your marks shows here from the first one on."));
}

async function label(params) {
  const [bar, data] = await Promise.all([EXPORT ? null : filters(params, false), ask("label", params)]);
  if (!data.here) return h("div", bar, scoreTable(data), empty("Nothing to mark",
    EXPORT ? "These are files: to mark verdicts, run srrl view RUN." : "Every verdict that these filters choose has a mark."));
  const { row, here: at } = data, item = row.criteria[at.k], now = data.labels[item.criterion], none = item.verdict === null;
  const onward = () => (data.next ? go(change({ open: data.next.id, k: data.next.k })) : render());
  const put = async (label) => {
    await post({ run: params.run || "", id: at.id, k: at.k, label });
    onward();
  };
  const marks = { y: none || item.verdict, n: !none && !item.verdict, u: null };
  const keys = Object.fromEntries(Object.entries(marks).map(([key, label]) => [key, () => put(label)]));
  const button = (key, text) => h("button", { class: now === marks[key] && "on", onclick: keys[key] }, text, h("kbd", key));
  const node = h("div", bar, h("div.split.opened",
    h("section", h("p.muted", `Step ${row.step}, ${row.split}, `,
      h("a", { href: link("samples", { run: params.run, open: at.id }) }, `${row.prompt_id}, sample ${row.sample}`)),
    conversation(row), h("div.panel.answer", h("div.text", row.response || nothing()))),
    h("section", h("div.panel.question",
      h("ul.criteria", judged(data, at.k, at.id, params)),
      h("h3", none ? "The judge gave no verdict. Is it met?" : `The judge says: ${item.verdict ? "met" : "not met"}. Is that right?`),
      h("div.buttons", button("y", none ? "Met" : "Right"), button("n", none ? "Not met" : "Wrong"),
        button("u", "Unsure"))),
    scoreTable(data))));
  return Object.assign(node, { keys });
}
