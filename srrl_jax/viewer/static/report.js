// The report: one page, drawn from the data that stands in it.
"use strict";

const REPORT = JSON.parse(document.getElementById("data").textContent);

function cards(samples) {
  return samples.map(([label, row]) => h("section.card", label && h("h4", label), conversation(row), answer(row, (item) => criterion(item))));
}

const folded = (summary, samples) => samples.length > 0 && h("details", h("summary", summary), cards(samples));

function report(data) {
  const { criteria, judges, disagreements, splits, headline, viewer } = data;
  return [
    h("h1", data.title),
    h("dl.facts", data.facts.map(([name, value]) => h("div", h("dt", name), h("dd", value))),
      viewer && h("div", h("dt", "Every sample"), h("dd", h("a", { href: viewer }, viewer)))),
    headline.length > 0 && h("section", h("h2", "Before and after"), table([
      ["", "measure", "", (row) => row.what, "left text"], ["", "before", "", (row) => number(row.before)],
      ["", "after", "", (row) => h("b", number(row.after))],
      ["", "change", "", (row) => typeof row.before === "number" && typeof row.after === "number" && signed(row.after - row.before)],
    ], headline)),
    h("section", h("h2", "How the run went"), curves(data)),
    criteria.length > 0 && h("section", h("h2", "Criteria to repair first"),
      criteriaTable(criteria, "criterion", judges, undefined, (row) => h("span", { title: row.text }, row.text))),
    disagreements.length > 0 && h("section", h("h2", "Where judges differ most"), cards(disagreements.slice(0, 1)),
      folded(`${disagreements.length - 1} more`, disagreements.slice(1))),
    splits.map(({ name, steps }) => h("section", h("h2", `${name} samples`),
      steps.map(({ heading, shown, rest, left_out: left }) => h("section", h("h3", heading), cards(shown),
        folded(`${rest.length} more of this step${left ? `; another ${left} are in samples.jsonl` : ""}`, rest))))),
    data.config && h("section", h("h2", "Resolved config"), h("details", h("summary", "config.yaml"), h("pre.panel", data.config))),
  ];
}

document.getElementById("main").replaceChildren(h("div", report(REPORT)));
