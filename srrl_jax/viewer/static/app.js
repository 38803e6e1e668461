// What ties it together: asks, draws what the address says, listens to keys, and follows the runs.
"use strict";

const VIEWS = { overview, samples, criteria, compare, label };
let KEYS = {}; // of the view that is shown
let RUNS = [], version = -1, drawing = 0, shownView = "";

async function ask(question, params = {}) {
  if (EXPORT) return offline(question, params);
  const given = Object.entries(params).filter(([, value]) => value !== undefined && value !== "");
  const answer = await fetch(`api/${question}?${new URLSearchParams(given)}`);
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error);
  return data;
}

async function post(body) {
  const answer = await fetch("api/label", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error((await answer.json()).error);
}

async function render() {
  const mine = ++drawing, { view, params } = here(), main = document.getElementById("main");
  if (!VIEWS[view]) return go("#overview");
  KEYS = {};
  const names = RUNS.map((run) => run.name);
  document.getElementById("run").replaceChildren(...names.map((name) =>
    h("option", { value: name, selected: name === (params.run || names[0]) }, name)));
  document.getElementById("tabs").replaceChildren(...Object.keys(VIEWS).map((name, i) => {
    const shown = name === view, title = name[0].toUpperCase() + name.slice(1);
    return h("a", { href: link(name, { run: params.run }), class: shown && "on", "aria-current": shown && "page", title: `key ${i + 1}` }, title);
  }));
  document.title = `${view}, ${params.run || names[0]}`;
  let node;
  try {
    node = await VIEWS[view](params);
  } catch (error) {
    node = h("div.empty", { role: "alert" }, h("h2", "That did not work"), h("p", error.message));
  }
  if (mine !== drawing) return; // another drawing has begun meanwhile
  const same = main.dataset.drawn === location.hash, open = [...main.querySelectorAll("details")].map((part) => part.open);
  const focus = document.activeElement?.id, scrolls = [...main.querySelectorAll(".list, .detail")].map((part) => part.scrollTop);
  main.replaceChildren(node);
  KEYS = node.keys || {};
  if (same) main.querySelectorAll("details").forEach((part, i) => { part.open = open[i] ?? part.open; });
  if (focus) document.getElementById(focus)?.focus();
  if (shownView === view) main.querySelectorAll(".list, .detail").forEach((part, i) => { part.scrollTop = scrolls[i] || 0; });
  else window.scrollTo(0, 0);
  shownView = view;
  main.dataset.drawn = location.hash;
}

async function follow() {
  const status = document.getElementById("status");
  try {
    const state = await ask("state");
    RUNS = state.runs;
    const run = RUNS.find((one) => one.name === here().params.run) || RUNS[0];
    status.textContent = state.fault || (run.progress < 1 ? `reading, ${percent(run.progress)}` : `${run.samples.toLocaleString("en")} samples`);
    status.className = state.fault ? "bad" : EXPORT ? "" : "live";
    const typing = document.activeElement?.tagName === "INPUT" || getSelection().toString();
    if (state.version !== version && !typing && !(version >= 0 && here().view === "label")) {
      version = state.version;
      await render();
    }
  } catch (error) {
    status.textContent = "srrl view has stopped";
    status.className = "bad";
  }
  if (!EXPORT) setTimeout(follow, 2000);
}

function step(by) {
  const rows = [...document.querySelectorAll("tr[data-open]")], now = rows.findIndex((row) => row.classList.contains("on"));
  const next = rows[now < 0 ? 0 : now + by];
  if (next) go(next.dataset.open);
}

const HELP = {
  "1 to 5": "Overview, Samples, Criteria, Compare, Label", "j k": "next, previous sample", "/": "search text",
  Esc: "close the sample", "y n u": "the verdict is right, wrong, unsure", "?": "these keys",
};

addEventListener("hashchange", render);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = event.key, view = Object.keys(VIEWS)[Number(key) - 1];
  if (view) go(link(view, { run: here().params.run }));
  else if (KEYS[key]) KEYS[key]();
  else if (key === "j" || key === "k") step(key === "j" ? 1 : -1);
  else if (key === "/" && document.getElementById("f-text")) { event.preventDefault(); document.getElementById("f-text").focus(); }
  else if (key === "Escape" && here().params.open) go(change({ open: "", beside: "", k: "" }));
  else if (key === "?") document.getElementById("help").showModal();
});
document.addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-open]");
  if (row && !event.target.closest("a") && !getSelection().toString()) go(row.dataset.open);
});
document.getElementById("run").addEventListener("change", (event) => go(link(here().view, { run: event.target.value })));
document.getElementById("keys").addEventListener("click", () => document.getElementById("help").showModal());
document.getElementById("help").append(h("h2", "Keys"),
  h("dl", Object.entries(HELP).map(([key, what]) => [h("dt", h("kbd", key)), h("dd", what)])),
  h("form", { method: "dialog" }, h("button", "Close")));
follow();
