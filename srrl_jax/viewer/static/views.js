// The five views: each turns the parameters of the address into an element.
"use strict";

const VERDICTS = { met: "met", unmet: "not met", unscorable: "unscorable", differ: "judges differ" };
const STATE = { 1: "met", 0: "unmet", "?": "unscorable" }; // by the mark of a verdict
const SORTS = {
  "-step": "step ↓", step: "step ↑", "-reward": "reward ↓", reward: "reward ↑", "-tokens": "length ↓", tokens: "length ↑",
  "-advantage": "advantage ↓", advantage: "advantage ↑", "-differ": "disagreement ↓",
};

const markOf = (verdict) => (verdict === null || verdict === undefined ? "?" : verdict ? "1" : "0");
const signOf = (points) => (points < 0 ? "minus" : "plus");
const minus = (points) => String(points).replace("-", "−");
const nothing = () => h("em.muted", "nothing that a user would see");
const openIn = (row) => change({ open: row.id, beside: "", k: "" });

function pill(verdict, points) {
  const state = STATE[markOf(verdict)];
  return h("span", { class: `pill ${state} ${signOf(points)}` }, VERDICTS[state]);
}

// Overview

async function overview(params) {
  const [data, other] = await Promise.all([ask("overview", params), params.other ? ask("overview", { run: params.other }) : null]);
  const curve = (key) => data.curves[key] || [];
  const tiles = Object.entries(data.tiles).filter(([key]) => curve(key).length).map(([key, label]) =>
    h("div.tile.panel", h("span", label), h("b", number(curve(key).at(-1)[1])), h("span", `${number(curve(key)[0][1])} at first`)));
  const lines = (labels) => Object.entries(labels).map(([key, label], colour) => ({ label, colour, points: curve(key) }));
  const axes = Object.keys(data.curves).filter((key) => key.startsWith("axis/")).map((key) => [key, key.slice(5)]);
  return h("div",
    data.warnings.length > 0 && h("section.warnings", data.warnings.map(([step, text]) => h("p", h("b", `Step ${step}  `), text))),
    tiles.length ? h("div.tiles", tiles)
      : empty("No step has been logged yet", "This page follows the run; it fills as soon as the first step is done."),
    phaseBar(data),
    h("div.charts",
      data.charts.map(([title, note, panels]) => panels.map(([heading, fraction, labels]) =>
        lineChart(panels.length > 1 ? `${title}: ${heading}` : title, note, lines(labels), fraction))),
      lineChart("Score by axis", "Points met over positive points, in training's answers.", lines(Object.fromEntries(axes)))),
    recipe(data.recipe, other && other.recipe, params));
}

function phaseBar(data) {
  const recent = data.phases.map((phase) => [phase, (data.curves[`time/${phase}`] || []).slice(-20)]).filter(([, points]) => points.length);
  const steps = Math.max(1, ...recent.map(([, points]) => points.length));
  const means = recent.map(([phase, points]) => [phase, points.reduce((sum, point) => sum + point[1], 0) / steps]);
  const total = means.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return null;
  let from = 0;
  const bars = means.map(([, seconds], i) => {
    const width = seconds / total * 1000;
    from += width;
    return h("rect", { class: `s${i % COLOURS}`, x: from - width, width, height: 12 });
  });
  return h("section.panel.phases", h("h3", `Where the time of a step goes: ${number(total)} s, mean of the last ${steps}`),
    h("svg", { viewBox: "0 0 1000 12", preserveAspectRatio: "none", "aria-hidden": "true" }, bars),
    h("ul.legend", means.map(([phase, seconds], i) =>
      h("li", { class: `s${i % COLOURS}` }, `${phase} `, h("b", `${number(seconds)} s`), ` ${percent(seconds / total)}`))));
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
  const chip = params.criterion && h("a.chip", { href: change({ criterion: "", page: "", open: "", beside: "", k: "" }), title: "Remove this filter" },
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
    const known = rows.filter((one) => one.reward !== null);
    return known.length ? [[step, known.reduce((sum, one) => sum + one.reward, 0) / known.length]] : [];
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
  return [
    h("div.head", h("a.close", { href: change({ open: "", beside: "" }), title: "Esc" }, "✕"),
      h("h2", `Step ${row.step}, ${row.split}, sample ${row.sample}`),
      h("a", { href: link("samples", { run: params.run, prompt: row.prompt_id, sort: "step" }) }, row.prompt_id)),
    group.length > 1 && h("p.group", h("span.muted", "Group "), group.map(dot), h("label", h("span", "beside"), beside)),
    conversation(row),
    h("div", { class: other && "pair" }, answer(data, params.open, params), other && answer(other, params.beside, params)),
    steps.size > 1 && h("section", h("h3", "This prompt over the steps"),
      lineChart("Mean reward", "", [{ label: "of its answers", colour: 0, points: history }]),
      h("ul.history", [...steps].map(([step, rows]) => h("li", h("b", `step ${step}`), h("span", rows.map(dot)),
        h("p", (rows.find((one) => one.sample === row.sample) || rows[0]).head))))),
  ];
}

const conversation = (row) => h("div.talk",
  row.prompt.map((turn) => h("div.turn", h("span.role", turn.role), h("div.text", turn.content))));

function answer(data, id, params) {
  const { row, keys, labels } = data, more = row.completion !== row.response;
  const thought = more && row.completion.endsWith(row.response);
  return h("article.panel.answer",
    h("p.facts", h("b.big", number(row.reward)), " reward", row.advantage !== null && `, advantage ${signed(row.advantage)}`,
      `, ${number(row.tokens)} tokens`, row.truncated && h("b.doubt", " truncated")),
    more && h("details", h("summary", thought ? "Thought" : "Whole completion"),
      h("div.text.muted", thought ? row.completion.slice(0, row.completion.length - row.response.length) : row.completion)),
    h("div.text", row.response || nothing()),
    h("ul.criteria", row.criteria.map((item, k) => criterion(item, k, keys[k], labels, id, params))));
}

function criterion(item, k, key, labels, id, params) {
  const others = JUDGES.slice(1).filter((judge) => judge in item), label = labels[item.criterion];
  const parts = (judge) => markOf(item[judge]) !== markOf(item.verdict);
  return h("li", { class: params.criterion === key && "on" },
    h("span", { class: `points ${signOf(item.points)}` }, (item.points > 0 ? "+" : "") + minus(item.points)),
    h("div",
      h("a.plain", { href: change({ criterion: key, page: "" }), title: "All samples with this criterion" }, item.criterion),
      h("div.judges", pill(item.verdict, item.points),
        typeof item.probability === "number" && h("span.muted", `p ${number(item.probability)}`),
        item.votes && h("span.muted", `${item.votes.filter(Boolean).length} of ${item.votes.length} votes say met`),
        item.tries > 1 && h("span.muted", `asked ${item.tries}×`),
        others.map((judge) => h("span", { class: parts(judge) && "differ" }, `${judge} `, pill(item[judge], item.points))),
        label !== undefined && h("span.label", `a person: ${label === null ? "unsure" : label ? "met" : "not met"}`),
        here().view !== "label" && h("a.muted", { href: link("label", { run: params.run, open: id, k }) }, "label")),
      item.explanation && h("p.why", item.explanation),
      others.filter(parts).map((judge) => item[`${judge}_explanation`] && h("p.why", h("b", `${judge}: `), item[`${judge}_explanation`]))));
}

// Criteria

async function criteria(params) {
  const { run, by, split } = params, [known, data] = await Promise.all([ask("options", { run }), ask("criteria", { run, by, split })]);
  const wanted = (params.text || "").toLowerCase(), sort = params.sort || "-repair", key = sort.replace("-", ""), way = sort[0] === "-" ? -1 : 1;
  const rows = data.rows.filter((row) => (row.text || row.name).toLowerCase().includes(wanted));
  rows.sort((a, b) => (a[key] === null) - (b[key] === null) || way * (a[key] - b[key]));
  const share = (value, bad) => h("span", { class: value !== null && bad && "bad" }, percent(value));
  const columns = [
    ["repair", "repair", "Unscorable + no variance + disagreement + |correlation with length|; less for few verdicts", (row) => number(row.repair)],
    ["", data.by, "", (row) => h("a.plain", { href: link("samples", { run, [data.by]: row.name, split }) }, row.text || row.name), "left text"],
    ["low", "points", "", (row) => [...new Set([row.low, row.high])].map(minus).join(" to ")],
    ["n", "verdicts", "", (row) => number(row.n)],
    ["met", "met", "", (row) => percent(row.met)],
    ["", "over time", "Met rate over the steps", (row) => spark(row.curve)],
    ["alike", "no variance", "Share of groups in which it tells no answer from another", (row) => share(row.alike, row.alike >= 0.8)],
    ["unscorable", "unscorable", "", (row) => share(row.unscorable, row.unscorable >= 0.05)],
    ...known.judges.slice(1).map((judge) =>
      [judge, `as ${judge}`, `Share of verdicts that are those of the ${judge} judge too`, (row) => share(row[judge], row[judge] <= 0.9)]),
    ["length", "with length", "Correlation of being met with the number of tokens",
      (row) => h("span", { class: Math.abs(row.length) >= 0.4 && "bad" }, number(row.length))],
    ["", "", "", (row) => data.by === "criterion" && h("a", { href: link("label", { run, criterion: row.name }) }, "label")],
  ];
  return h("div", h("div.filters",
    h("span.switch", ["criterion", "axis", "theme"].map((name) =>
      h("a", { class: data.by === name && "on", href: change({ by: name, text: "", sort: "" }) }, `by ${name}`))),
    choose("split", "Split", known.split), type("text", "Text", "in the criterion", 20),
    h("span.muted", `${rows.length} of ${data.total}, those to repair first on top`)),
  rows.length ? table(columns, rows.slice(0, 200), { sort })
    : empty(`Nothing by ${data.by}`, "The samples carry no such tag, or none was graded yet."));
}

// Compare

async function compare(params) {
  if (RUNS.length < 2) return empty("One run is here", "Give two or more: srrl view RUN OTHER. Their curves then share a chart, " +
    "and the prompts on which they differ most come first.");
  const names = RUNS.map((run) => run.name);
  const [data, ...runs] = await Promise.all([ask("compare", params), ...names.map((run) => ask("overview", { run }))]);
  const { rows, split, step } = data;
  const charts = runs[0].charts.flatMap(([, note, panels]) => panels.flatMap(([, fraction, lines]) =>
    Object.entries(lines).map(([key, label]) =>
      lineChart(label, note, runs.map((run, colour) => ({ label: names[colour], colour, points: run.curves[key] || [] })), fraction))));
  const columns = [["", "prompt", "", (row) => row.head, "left text"],
    ...names.map((run, i) => ["", run, "Opens the newest answer", (row) =>
      h("a", { href: link("samples", { run, prompt: row.prompt_id, split, step, open: row.ids[i] }) }, number(row.means[i]))]),
    ["", "apart", "", (row) => number(row.spread)]];
  return h("div", h("h2", "Curves"), h("div.charts", charts),
    h("h2", `Prompts on which they differ most, ${split === "eval" ? "held-out" : split}${step ? `, step ${step}` : ""}`),
    h("div.filters", choose("split", "Split", ["train"], undefined, "held-out"), !EXPORT && type("step", "Step", "3 or 1..9", 6)),
    rows.length ? table(columns, rows, {})
      : empty("No prompt in common", "Runs are compared on the prompts that all of them have answered."));
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
      h("ul.criteria", criterion(item, at.k, data.keys[at.k], data.labels, at.id, params)),
      h("h3", none ? "The judge gave no verdict. Is it met?" : `The judge says: ${item.verdict ? "met" : "not met"}. Is that right?`),
      h("div.buttons", button("y", none ? "Met" : "Right"), button("n", none ? "Not met" : "Wrong"),
        button("u", "Unsure"))),
    scoreTable(data))));
  return Object.assign(node, { keys });
}
