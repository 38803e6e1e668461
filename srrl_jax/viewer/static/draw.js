// What the viewer and the report both draw: key numbers, curves, criteria, a sample with its verdicts.
"use strict";

const JUDGES = ["self", "frozen", "teacher", "own"];
const VERDICTS = { met: "met", unmet: "not met", unscorable: "unscorable", differ: "judges differ" };
const STATE = { 1: "met", 0: "unmet", "?": "unscorable" }; // by the mark of a verdict

const markOf = (verdict) => (verdict === null || verdict === undefined ? "?" : verdict ? "1" : "0");
const signOf = (points) => (points < 0 ? "minus" : "plus");
const nothing = () => h("em.muted", "nothing that a user would see");
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

function pill(verdict, points) {
  const state = STATE[markOf(verdict)];
  return h("span", { class: `pill ${state} ${signOf(points)}` }, VERDICTS[state]);
}

// Of a run as a whole: `data` answers the question `overview`.

function curves(data) {
  const lines = (labels) => Object.entries(labels).map(([key, label], colour) => ({ label, colour, points: data.curves[key] || [] }));
  const axes = Object.keys(data.curves).filter((key) => key.startsWith("axis/")).map((key) => [key, key.slice(5)]);
  return [
    data.warnings.length > 0 && h("section.warnings", h("h3", "Warnings"), data.warnings.map(([step, text]) => h("p", h("b", `Step ${step}  `), text))),
    tiles(data), phases(data),
    h("div.charts", data.charts.map(([title, note, fraction, labels]) => lineChart(title, note, lines(labels), fraction)),
      lineChart("Score by axis", "Points met over positive points, in training's answers.", lines(Object.fromEntries(axes))),
      seconds(lines(Object.fromEntries(data.phases.map((phase) => [`time/${phase}`, phase]))))),
  ];
}

function tiles(data) {
  const known = Object.entries(data.tiles).filter(([key]) => data.curves[key]);
  if (!known.length) return empty("No step has been logged yet", "A run logs its first step as soon as that is done.");
  return h("div.tiles", { title: "Means over the last tenth of the run, and over the first" }, known.map(([key, label]) => {
    const values = data.curves[key].map(([, value]) => value), tenth = Math.max(1, Math.floor(values.length / 10));
    return h("div.tile.panel", h("span", label), h("b", number(mean(values.slice(-tenth)))),
      h("span", `${number(mean(values.slice(0, tenth)))} at the start`));
  }));
}

function phases(data) {
  const recent = data.phases.map((phase) => [phase, (data.curves[`time/${phase}`] || []).slice(-20)]).filter(([, points]) => points.length);
  const steps = Math.max(1, ...recent.map(([, points]) => points.length));
  const means = recent.map(([phase, points]) => [phase, points.reduce((sum, point) => sum + point[1], 0) / steps]);
  const total = means.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return null;
  let from = 0;
  const bars = means.map(([, seconds], i) => {
    const width = seconds / total * 1000;
    from += width;
    return h("rect", { class: `s${i}`, x: from - width, width, height: 12 });
  });
  return h("section.panel.phases", h("h3", `Where the time of a step goes: ${number(total)} s, mean of the last ${steps}`),
    h("svg", { viewBox: "0 0 1000 12", preserveAspectRatio: "none", "aria-hidden": "true" }, bars),
    h("ul.legend", means.map(([phase, seconds], i) =>
      h("li", { class: `s${i}` }, `${phase} `, h("b", `${number(seconds)} s`), ` ${percent(seconds / total)}`))));
}

// The seconds of each phase; a first step that compiles would flatten all others, so it is cut off.
function seconds(lines) {
  const sorted = lines.map((line) => line.points.map(([, value]) => value).sort((a, b) => a - b)).filter((values) => values.length);
  const usual = 1.25 * Math.max(...sorted.map((values) => values[Math.ceil(0.95 * values.length) - 1]));
  const most = Math.max(...sorted.map((values) => values.at(-1))), cut = most > 1.5 * usual;
  return lineChart("Seconds", `Of each phase of a step.${cut ? ` The most, ${number(most)}, is cut off.` : ""}`, lines, false, cut ? usual : undefined);
}

// A table of rows of the question `criteria`; `name` draws the first cell, `more` are columns after the others.
function criteriaTable(rows, by, judges, sort, name, more = []) {
  const share = (value, bad) => h("span", { class: value !== null && bad && "bad" }, percent(value));
  return table([
    ["repair", "repair", "Unscorable + no variance + disagreement + |correlation with length|; less for few verdicts", (row) => number(row.repair)],
    ["", by, "", name, "left text"],
    ["low", "points", "", (row) => [...new Set([row.low, row.high])].map(minus).join(" to ")],
    ["n", "verdicts", "", (row) => number(row.n)],
    ["met", "met", "Share of verdicts that could be read", (row) => percent(row.met)],
    ["", "over time", "Met rate over the steps", (row) => spark(row.curve)],
    ["alike", "no variance", "Share of groups in which it tells no answer from another", (row) => share(row.alike, row.alike >= 0.8)],
    ["unscorable", "unscorable", "Share of verdicts that could not be read", (row) => share(row.unscorable, row.unscorable >= 0.05)],
    ...judges.slice(1).map((judge) =>
      [judge, `as ${judge}`, `Share of verdicts that are those of the ${judge} judge too`, (row) => share(row[judge], row[judge] <= 0.9)]),
    ["length", "with length", "Correlation of being met with the number of tokens",
      (row) => h("span", { class: Math.abs(row.length) >= 0.4 && "bad" }, number(row.length))],
    ...more,
  ], rows, { sort });
}

// Of a sample: `row` is its line of samples.jsonl.

const conversation = (row) => h("div.talk",
  row.prompt.map((turn) => h("div.turn", h("span.role", turn.role), h("div.text", turn.content))));

// `draw` makes the element of a criterion.
function answer(row, draw) {
  const more = row.completion !== row.response, thought = more && row.completion.endsWith(row.response);
  const sum = (items) => items.reduce((total, item) => total + item.points, 0);
  const read = row.criteria.filter((item) => item.verdict !== null), met = read.filter((item) => item.verdict);
  const positive = (items) => items.filter((item) => item.points > 0), lost = sum(met) - sum(positive(met));
  return h("article.panel.answer",
    h("p.facts", h("b.big", number(row.reward)), ` reward, ${minus(sum(positive(met)))} of ${minus(sum(positive(read)))} points`,
      lost < 0 && `, ${minus(lost)} in penalties`, row.advantage !== null && `, advantage ${signed(row.advantage)}`,
      `, ${number(row.tokens)} tokens`, row.truncated && h("b.doubt", " truncated")),
    more && h("details", h("summary", thought ? "Thought" : "Whole completion"),
      h("div.text.muted", thought ? row.completion.slice(0, row.completion.length - row.response.length) : row.completion)),
    h("div.text", row.response || nothing()),
    h("ul.criteria", row.criteria.map(draw)));
}

// `name` is its text, or a link with it; `more` stands behind the judges.
function criterion(item, name = item.criterion, ...more) {
  const others = JUDGES.slice(1).filter((judge) => judge in item);
  const parts = (judge) => markOf(item[judge]) !== markOf(item.verdict);
  return h("li",
    h("span", { class: `points ${signOf(item.points)}` }, (item.points > 0 ? "+" : "") + minus(item.points)),
    h("div", name,
      h("div.judges", pill(item.verdict, item.points),
        typeof item.probability === "number" && h("span.muted", `p ${number(item.probability)}`),
        item.votes && h("span.muted", `${item.votes.filter(Boolean).length} of ${item.votes.length} votes say met`),
        item.tries > 1 && h("span.muted", `asked ${item.tries}×`),
        others.map((judge) => h("span", { class: parts(judge) && "differ" }, `${judge} `, pill(item[judge], item.points))),
        more),
      item.explanation && h("p.why", item.explanation),
      others.filter(parts).map((judge) => item[`${judge}_explanation`] && h("p.why", h("b", `${judge}: `), item[`${judge}_explanation`]))));
}
