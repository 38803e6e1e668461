// The five views: each turns the parameters of the address into an element.
"use strict";

const VERDICTS = { met: "met", unmet: "not met", unscorable: "unscorable", differ: "judges differ" };
const STATE = { 1: "met", 0: "unmet", "?": "unscorable" };
const markOf = (verdict) => (verdict === null || verdict === undefined ? "?" : verdict ? "1" : "0");
const pill = (verdict, points) => h("span", { class: `pill ${STATE[markOf(verdict)]} ${points < 0 ? "minus" : "plus"}` }, VERDICTS[STATE[markOf(verdict)]]);
const openIn = (row, more = {}) => change({ open: row.id, beside: "", k: "", ...more });

// Overview

async function overview(params) {
  const [data, other] = await Promise.all([ask("overview", params), params.other ? ask("overview", { run: params.other }) : null]);
  const curve = (key) => data.curves[key] || [];
  const tiles = Object.entries({ "reward/mean": "Self-given reward", "eval/self": "Held-out, self-graded", kl: "KL to the reference", entropy: "Entropy",
    "completions/mean_length": "Completion length", "grader/unscorable": "Unscorable verdicts", "perf/tokens_per_s": "Tokens per second", "perf/mfu": "Update, of the peak" })
    .filter(([key]) => curve(key).length)
    .map(([key, label]) => h("div", { class: "tile panel" }, h("span", {}, label), h("b", {}, number(curve(key).at(-1)[1])), h("span", {}, `${number(curve(key)[0][1])} at first`)));
  const charts = data.charts.flatMap(([title, note, panels]) => panels.map(([heading, fraction, lines]) =>
    lineChart(panels.length > 1 ? `${title}: ${heading}` : title, note, Object.entries(lines).map(([key, label], colour) => ({ label, colour, points: curve(key) })), fraction)));
  const axes = Object.keys(data.curves).filter((key) => key.startsWith("axis/"));
  charts.push(lineChart("Score by axis", "Points met over positive points of each axis, in training's answers.", axes.map((key, colour) => ({ label: key.slice(5), colour, points: curve(key) }))));
  return h("div", {},
    data.warnings.length ? h("section", { class: "warnings" }, data.warnings.map(([step, text]) => h("p", {}, h("b", {}, `Step ${step}  `), text))) : null,
    tiles.length ? h("div", { class: "tiles" }, tiles) : empty("No step has been logged yet", "This page follows the run; it fills as soon as the first step is done."),
    phaseBar(data), h("div", { class: "charts" }, charts), recipe(data.recipe, other && other.recipe, params));
}

function phaseBar(data) {
  const recent = data.phases.map((phase) => [phase, (data.curves[`time/${phase}`] || []).slice(-20)]).filter(([, points]) => points.length);
  const steps = Math.max(1, ...recent.map(([, points]) => points.length));
  const means = recent.map(([phase, points]) => [phase, points.reduce((sum, p) => sum + p[1], 0) / steps]);
  const total = means.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return null;
  let from = 0;
  return h("section", { class: "panel phases" }, h("h3", {}, `Where the time of a step goes: ${number(total)} s, mean of the last ${steps}`),
    h("svg", { viewBox: "0 0 1000 12", preserveAspectRatio: "none", "aria-hidden": "true" }, means.map(([, seconds], i) => {
      const bar = h("rect", { class: `s${i % COLOURS}`, x: from, width: seconds / total * 1000, height: 12 });
      from += seconds / total * 1000;
      return bar;
    })),
    h("ul", { class: "legend" }, means.map(([phase, seconds], i) => h("li", { class: `s${i % COLOURS}` }, `${phase} `, h("b", {}, `${number(seconds)} s`), ` ${percent(seconds / total)}`))));
}

function recipe(mine, other, params) {
  const names = Object.keys({ ...mine, ...other });
  if (!names.length) return null;
  const differing = names.filter((name) => other && mine[name] !== other[name]);
  const rows = params.all || !other ? names : differing;
  return h("section", {}, h("h2", {}, "Recipe"),
    RUNS.length > 1 && h("div", { class: "filters" }, choose("other", "Difference to", RUNS.map((run) => run.name).filter((name) => name !== (params.run || RUNS[0].name))),
      other && h("a", { href: change({ all: params.all ? "" : "1" }) }, params.all ? `only the ${differing.length} that differ` : `all ${names.length} keys`)),
    h("details", { open: Boolean(other) }, h("summary", {}, other ? `${differing.length} of ${names.length} keys differ` : `${names.length} keys`),
      table([["", "key", "", (name) => name, "left mono"], ["", params.run || RUNS[0].name, "", (name) => mine[name] ?? "–", "left mono"],
        ...(other ? [["", params.other, "", (name) => other[name] ?? "–", "left mono"]] : [])],
      rows, { attributes: (name) => ({ class: differing.includes(name) && params.all ? "on" : "" }) })));
}

// Samples

function strip(row) {
  return h("span", { class: "strip", title: `${[...row.self].filter((m) => m === "1").length} of ${row.self.length} criteria met${row.differ ? `; judges differ on ${row.differ}` : ""}` },
    [...row.self].map((m, k) => h("i", { class: `${STATE[m]} ${row.points[k] < 0 ? "minus" : "plus"} ${differs(row, k) ? "differ" : ""}` })));
}

async function filters(params, sorts) {
  const known = await ask("options", { run: params.run });
  const chip = (name, text) => params[name] && h("a", { class: "chip", href: change({ [name]: "", page: "", open: "", beside: "" }), title: "Remove this filter" }, text, " ×");
  return h("div", { class: "filters" },
    type("text", "Text", "in prompt, answer, reasons", 20), type("step", "Step", "3 or 1..9", 6), choose("split", "Split", known.split),
    type("reward", "Reward", "0.2..0.6", 7), type("tokens", "Length", "..200", 6), choose("truncated", "Truncated", ["yes", "no"]),
    known.theme.length ? choose("theme", "Theme", known.theme) : null, known.axis.length ? choose("axis", "Axis", known.axis) : null,
    choose("verdict", "Verdict", Object.keys(VERDICTS), (key) => VERDICTS[key]),
    sorts && choose("sort", "Sort", ["-step", "step", "-reward", "reward", "-tokens", "tokens", "-advantage", "advantage", "-differ"], (key) => ({ differ: "disagreement", tokens: "length" }[key.replace("-", "")] || key.replace("-", "")) + (key[0] === "-" ? " ↓" : " ↑"), "newest"),
    chip("prompt", `prompt ${params.prompt}`), chip("criterion", `criterion ${params.criterion}`));
}

async function samples(params) {
  const [bar, list, opened, other] = await Promise.all([filters(params, true), ask("samples", params),
    params.open ? ask("sample", params) : null, params.beside ? ask("sample", { ...params, open: params.beside }) : null]);
  const last = Math.max(0, Math.ceil(list.total / list.size) - 1), page = Number(params.page || 0);
  const rows = table([
    ["step", "step", "", (row) => row.step], ["", "split", "", (row) => row.split, "left wide"],
    ["reward", "reward", "", (row) => h("a", { href: openIn(row) }, number(row.reward))],
    ["advantage", "adv.", "Reward relative to the group", (row) => number(row.advantage), "wide"], ["tokens", "tokens", "", (row) => [number(row.tokens), row.truncated && h("b", { class: "doubt", title: "truncated" }, " ✂")], "wide"],
    ["differ", "criteria", "Green: met; red: met, and points are lost; amber: unscorable; underlined: judges differ", strip, "left"],
    ["", "answer", "", (row) => row.head || h("em", { class: "muted" }, "nothing that a user would see"), "left text"],
  ], list.rows, { sort: params.sort || "", attributes: (row) => ({ class: String(row.id) === params.open ? "on" : "", "data-open": openIn(row) }) });
  const pages = h("div", { class: "pages" }, h("span", {}, `${list.total.toLocaleString("en")} samples, mean reward ${number(list.mean)}`),
    page > 0 && h("a", { href: change({ page: page - 1 || "" }) }, "← previous page"), last > 0 && h("span", {}, `page ${page + 1} of ${last + 1}`), page < last && h("a", { href: change({ page: page + 1 }), id: "next" }, "next page →"));
  return h("div", { class: opened ? "split opened" : "split" },
    h("section", { class: "list" }, bar, list.total ? [pages, rows] : empty("No sample is like that", "Take a filter away, or wait: this page follows the run.")),
    opened && h("section", { class: "detail", id: "detail" }, detail(opened, other, params)));
}

function detail(data, other, params) {
  const { row } = data;
  const group = data.same.filter((sibling) => sibling.step === row.step);
  const steps = Map.groupBy(data.same, (sibling) => sibling.step);
  const mean = (rows) => { const known = rows.filter((r) => r.reward !== null); return known.reduce((sum, r) => sum + r.reward, 0) / known.length; };
  const history = [...steps].filter(([, rows]) => rows.some((r) => r.reward !== null)).map(([step, rows]) => [step, mean(rows)]);
  const dot = (sibling) => h("a", { class: String(sibling.id) === params.open ? "chip on" : String(sibling.id) === params.beside ? "chip beside" : "chip", href: openIn(sibling),
    title: `advantage ${signed(sibling.advantage)}, ${sibling.tokens} tokens` }, `#${sibling.sample} `, h("b", {}, number(sibling.reward)));
  return [
    h("div", { class: "head" }, h("a", { href: change({ open: "", beside: "" }), class: "close", title: "Esc" }, "✕"),
      h("h2", {}, `Step ${row.step}, ${row.split}, sample ${row.sample}`), h("a", { href: link("samples", { run: params.run, prompt: row.prompt_id, sort: "step" }) }, row.prompt_id)),
    group.length > 1 && h("p", { class: "group" }, h("span", { class: "muted" }, "Group "), group.map(dot),
      h("label", {}, h("span", {}, "beside"), h("select", { id: "f-beside", onchange: (event) => go(change({ beside: event.target.value })) }, h("option", { value: "" }, "none"),
        group.filter((s) => s.id !== Number(params.open)).map((s) => h("option", { value: s.id, selected: String(s.id) === params.beside }, `#${s.sample}, ${number(s.reward)}`))))),
    conversation(row),
    h("div", { class: other ? "pair" : "" }, answer(data, params.open, params), other && answer(other, params.beside, params)),
    steps.size > 1 && h("section", {}, h("h3", {}, "This prompt over the steps"), lineChart("Mean reward", "", [{ label: "of its answers", colour: 0, points: history }]),
      h("ul", { class: "history" }, [...steps].map(([step, rows]) => h("li", {}, h("b", {}, `step ${step}`), h("span", {}, rows.map(dot)), h("p", {}, (rows.find((r) => r.sample === row.sample) || rows[0]).head))))),
  ];
}

const conversation = (row) => h("div", { class: "talk" }, row.prompt.map((turn) => h("div", { class: "turn" }, h("span", { class: "role" }, turn.role), h("div", { class: "text" }, turn.content))));

function answer(data, id, params) {
  const { row, keys, labels } = data;
  const thought = row.completion !== row.response && row.completion.endsWith(row.response) ? row.completion.slice(0, row.completion.length - row.response.length) : null;
  return h("article", { class: "panel answer" },
    h("p", { class: "facts" }, h("b", { class: "big" }, number(row.reward)), ` reward`, row.advantage !== null && `, advantage ${signed(row.advantage)}`, `, ${number(row.tokens)} tokens`, row.truncated && h("b", { class: "doubt" }, " truncated")),
    row.completion !== row.response && h("details", {}, h("summary", {}, thought === null ? "Whole completion" : "Thought"), h("div", { class: "text muted" }, thought === null ? row.completion : thought)),
    h("div", { class: "text" }, row.response || h("em", { class: "muted" }, "nothing that a user would see")),
    h("ul", { class: "criteria" }, row.criteria.map((item, k) => criterion(item, k, keys[k], labels, id, params))));
}

function criterion(item, k, key, labels, id, params) {
  const others = ["frozen", "teacher"].filter((judge) => judge in item);
  const asked = params.criterion === key;
  const label = labels[item.criterion];
  return h("li", { class: asked ? "on" : "" },
    h("span", { class: `points ${item.points < 0 ? "minus" : "plus"}` }, (item.points > 0 ? "+" : "") + String(item.points).replace("-", "−")),
    h("div", {},
      h("a", { class: "plain", href: change({ criterion: key, page: "" }), title: "All samples with this criterion" }, item.criterion),
      h("div", { class: "judges" }, pill(item.verdict, item.points),
        item.probability !== null && item.probability !== undefined && h("span", { class: "muted" }, `p ${number(item.probability)}`), item.tries > 1 && h("span", { class: "muted" }, `asked ${item.tries}×`),
        others.map((judge) => h("span", { class: markOf(item[judge]) !== markOf(item.verdict) ? "differ" : "" }, `${judge} `, pill(item[judge], item.points))),
        label !== undefined && h("span", { class: "label" }, `a person: ${label ? "met" : "not met"}`),
        here().view !== "label" && h("a", { class: "muted", href: link("label", { run: params.run, open: id, k }) }, "label")),
      item.explanation && h("p", { class: "why" }, item.explanation),
      others.map((judge) => item[`${judge}_explanation`] && markOf(item[judge]) !== markOf(item.verdict) && h("p", { class: "why" }, h("b", {}, `${judge}: `), item[`${judge}_explanation`]))));
}

// Criteria

async function criteria(params) {
  const [known, data] = await Promise.all([ask("options", { run: params.run }), ask("criteria", { run: params.run, by: params.by, split: params.split })]);
  const wanted = (params.text || "").toLowerCase(), sort = params.sort || "-repair", key = sort.replace("-", ""), way = sort[0] === "-" ? -1 : 1;
  const rows = data.rows.filter((row) => (row.text || row.name).toLowerCase().includes(wanted));
  rows.sort((a, b) => (a[key] === null) - (b[key] === null) || way * (a[key] - b[key]));
  const bad = (value, limit) => (value !== null && value >= limit ? "bad" : "");
  const cell = (get, limit, shown = percent) => (row) => h("span", { class: bad(get(row), limit) }, shown(get(row)));
  const columns = [
    ["repair", "repair", "Unscorable + without variance + disagreement + |correlation with length|; less for few verdicts", (row) => number(row.repair)],
    ["", data.by, "", (row) => h("a", { class: "plain", href: link("samples", { run: params.run, [data.by]: row.name, split: params.split }) }, row.text || row.name), "left text"],
    ["low", "points", "", (row) => [...new Set([row.low, row.high])].map((p) => String(p).replace("-", "−")).join(" to ")],
    ["n", "verdicts", "", (row) => number(row.n)], ["met", "met", "", (row) => percent(row.met)], ["", "over time", "Met rate over the steps", (row) => spark(row.curve)],
    ["alike", "no variance", "Share of groups in which it tells no answer from another", cell((row) => row.alike, 0.8)],
    ["unscorable", "unscorable", "", cell((row) => row.unscorable, 0.05)],
    ...known.judges.slice(1).map((judge) => [judge, `as ${judge}`, `Share of verdicts that are those of the ${judge} judge too`, cell((row) => row[judge] === null ? null : 1 - row[judge], 0.1, (v) => percent(v === null ? null : 1 - v))]),
    ["length", "with length", "Correlation of being met with the number of tokens", cell((row) => row.length === null ? null : Math.abs(row.length), 0.4, number)],
    ["", "", "", (row) => data.by === "criterion" && h("a", { href: link("label", { run: params.run, criterion: row.name }) }, "label")],
  ];
  return h("div", {}, h("div", { class: "filters" },
    h("span", { class: "switch" }, ["criterion", "axis", "theme"].map((by) => h("a", { class: data.by === by ? "on" : "", href: change({ by, text: "", sort: "" }) }, `by ${by}`))),
    choose("split", "Split", known.split), type("text", "Text", "in the criterion", 20),
    h("span", { class: "muted" }, `${rows.length} of ${data.total}, those to repair first on top`)),
  rows.length ? table(columns, rows.slice(0, 200), { sort: sort }) : empty(`Nothing by ${data.by}`, "The samples carry no such tag, or none was graded yet."));
}

// Compare

async function compare(params) {
  if (RUNS.length < 2) return empty("One run is here", "Give two or more: srrl view RUN OTHER. Their curves then share a chart, and the prompts on which they differ most come first.");
  const names = RUNS.map((run) => run.name);
  const [rows, ...runs] = await Promise.all([ask("compare", params), ...names.map((run) => ask("overview", { run }))]);
  const charts = runs[0].charts.flatMap(([title, note, panels]) => panels.flatMap(([, fraction, lines]) => Object.entries(lines).map(([key, label]) =>
    lineChart(label, note, runs.map((run, colour) => ({ label: names[colour], colour, points: run.curves[key] || [] })), fraction))));
  const columns = [["", "prompt", "", (row) => row.head, "left text"],
    ...names.map((run, i) => ["", run, "Opens the newest answer", (row) => h("a", { href: link("samples", { run, prompt: row.prompt_id, split: rows.split, step: rows.step, open: row.ids[i] }) }, number(row.means[i]))]),
    ["", "apart", "", (row) => number(row.spread)]];
  return h("div", {}, h("h2", {}, "Curves"), h("div", { class: "charts" }, charts), h("h2", {}, `Prompts on which they differ most, ${rows.split === "eval" ? "held-out" : rows.split}${rows.step ? `, step ${rows.step}` : ""}`),
    h("div", { class: "filters" }, choose("split", "Split", ["train"], undefined, "held-out"), EXPORT ? null : type("step", "Step", "3 or 1..9", 6)),
    rows.rows.length ? table(columns, rows.rows, {}) : empty("No prompt in common", "Runs are compared on the prompts that all of them have answered."));
}

// Label

async function label(params) {
  const [known, data] = await Promise.all([filters(params, false), ask("label", params)]);
  const judges = Object.entries(data.scores);
  const score = h("section", { class: "panel score" }, h("h3", {}, `${data.labelled} marked in labels.jsonl`),
    judges.length ? table([["", "judge", "", ([name]) => name, "left"], ["", "F1", "Mean of the next two", ([, s]) => number(s.balanced)], ["", "met", "F1 of met", ([, s]) => number(s.met)], ["", "not met", "F1 of not met", ([, s]) => number(s.unmet)], ["", "n", "", ([, s]) => s.n]], judges, {})
      : h("p", { class: "muted" }, "The judges' F1 against your marks shows here from the first one on."));
  if (!data.here) return h("div", {}, EXPORT ? null : known, score, empty("Nothing to mark", EXPORT ? "These are files: to mark verdicts, run srrl view RUN." : "Every verdict that these filters choose has a mark."));
  const { row, here: at } = data, item = row.criteria[at.k], now = data.labels[item.criterion];
  const onward = () => (data.next ? go(change({ open: data.next.id, k: data.next.k })) : render());
  const put = async (right) => {
    const met = item.verdict === null ? right : item.verdict === right;
    await post({ run: params.run || "", id: at.id, k: at.k, label: met });
    onward();
  };
  KEYS.y = () => put(true);
  KEYS.n = () => put(false);
  KEYS.u = onward;
  const shown = item.verdict === null ? "The judge gave no verdict. Is it met?" : `The judge says: ${item.verdict ? "met" : "not met"}. Is that right?`;
  return h("div", {}, known, h("div", { class: "split opened" },
    h("section", {}, h("p", { class: "muted" }, `Step ${row.step}, ${row.split}, `, h("a", { href: link("samples", { run: params.run, open: at.id }) }, `${row.prompt_id}, sample ${row.sample}`)),
      conversation(row), h("div", { class: "panel answer" }, h("div", { class: "text" }, row.response || h("em", { class: "muted" }, "nothing that a user would see")))),
    h("section", {}, h("div", { class: "panel question" }, h("ul", { class: "criteria" }, criterion(item, at.k, data.keys[at.k], data.labels, at.id, params)),
      h("h3", {}, shown),
      h("div", { class: "buttons" }, h("button", { id: "yes", class: now !== undefined && now === (item.verdict ?? true) ? "on" : "", onclick: KEYS.y }, item.verdict === null ? "Met" : "Right", h("kbd", {}, "y")),
        h("button", { id: "no", class: now !== undefined && now !== (item.verdict ?? true) ? "on" : "", onclick: KEYS.n }, item.verdict === null ? "Not met" : "Wrong", h("kbd", {}, "n")),
        h("button", { id: "unsure", onclick: KEYS.u }, "Unsure", h("kbd", {}, "u")))), score)));
}
