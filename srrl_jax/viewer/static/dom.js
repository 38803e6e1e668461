// Elements, links and numbers. Text goes in as text nodes alone: nothing that a model wrote is ever parsed.
"use strict";

// h("tag.class.class", { attribute: value, onEVENT: function }, child, [child, ...], ...); attributes may be left out.
function h(what, ...children) {
  const [tag, ...classes] = what.split("."), attributes = children[0]?.constructor === Object ? children.shift() : {};
  const svg = ["svg", "path", "line", "text", "circle", "g", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "selected") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// What is seen is in the address: #VIEW?KEY=VALUE&...
function here() {
  const [view, query] = location.hash.slice(1).split("?");
  return { view: view || "overview", params: Object.fromEntries(new URLSearchParams(query)) };
}

function link(view, params) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return `#${view}${query ? "?" + query : ""}`;
}

// The same view with some parameters changed.
const change = (changes) => link(here().view, { ...here().params, ...changes });
const go = (hash) => { location.hash = hash; };

const number = (value) => {
  if (typeof value !== "number") return value ?? "–";
  const size = Math.abs(value);
  const digits = Number.isInteger(value) || size >= 1000 ? 0 : size >= 100 ? 0 : size >= 10 ? 1 : 2;
  if (size && size < 0.01) return value.toPrecision(2).replace("-", "−");
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
};
const minus = (value) => String(value).replace("-", "−"); // of rubric points, which are mostly whole
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const percent = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)}%`);

const empty = (title, text) => h("div.empty", h("h2", title), h("p", text));

// Controls whose value is a parameter of the address; to choose other rows closes the one that is open.
const filtered = (changes) => change({ page: "", open: "", beside: "", k: "", ...changes });

function control(name, label, tag, attributes, options) {
  const onchange = (event) => go(filtered({ [name]: event.target.value.trim() }));
  return h("label", { class: here().params[name] && "set" }, h("span", label), h(tag, { id: `f-${name}`, onchange, ...attributes }, options));
}

function choose(name, label, options, shown = (option) => option, none = "any") {
  const now = here().params[name] || "", all = now && !options.includes(now) ? [now, ...options] : options;
  return control(name, label, "select", {}, [h("option", { value: "" }, none),
    all.map((option) => h("option", { value: option, selected: option === now }, shown(option)))]);
}

const type = (name, label, placeholder, size) =>
  control(name, label, "input", { value: here().params[name] || "", placeholder, size, autocomplete: "off" });

// A table whose heads sort: columns are [key, head, title, cell].
function table(columns, rows, { sort, attributes = () => ({}) } = {}) {
  const heads = columns.map(([key, head, title, , left]) => {
    const now = sort === key ? " ↑" : sort === `-${key}` ? " ↓" : "";
    const name = sort === undefined || !key ? head : h("a", { href: change({ sort: sort === `-${key}` ? key : `-${key}`, page: "" }) }, head + now);
    return h("th", { title, scope: "col", class: left && left.replace("text", "") }, name);
  });
  return h("div.scroll", h("table", h("thead", h("tr", heads)),
    h("tbody", rows.map((row) => h("tr", attributes(row),
      columns.map(([, , , cell, left]) => h("td", { class: left }, (left || "").includes("text") ? h("div.clamp", cell(row)) : cell(row))))))));
}
