// The questions of the page where there is no server: `srrl view --export` writes their answers into data.js.
"use strict";

const ANSWERS = {}; // filled by the files
const loaded = new Map(); // file -> promise of what it holds
function load(file) {
  if (!loaded.has(file)) {
    if (loaded.size > 40) loaded.delete(loaded.keys().next().value);
    loaded.set(file, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = file;
      script.onload = () => { script.remove(); resolve(ANSWERS[file]); delete ANSWERS[file]; };
      script.onerror = () => reject(new Error(`${file} is not there`));
      document.head.append(script);
    }));
  }
  return loaded.get(file);
}

const within = (wanted, value) => {
  const [low, high] = wanted.includes("..") ? wanted.split("..") : [wanted, wanted];
  return value !== null && (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
};
const mark = (row, judge, k) => (row[judge] ? row[judge][k] : "?");
const differs = (row, k) => {
  const given = JUDGES.map((judge) => mark(row, judge, k));
  return given.includes("0") && given.includes("1");
};

async function offline(question, params) {
  const number = Math.max(0, EXPORT.state.runs.findIndex((run) => run.name === params.run));
  if (question === "state") return EXPORT.state;
  if (question === "label") return EXPORT.label[number];
  if (question === "compare") return EXPORT.compare[params.split || "eval"];
  if (question === "overview") return EXPORT.overview[number];
  if (question === "options") {
    const chosen = EXPORT.criteria[number].criterion[""].rows.find((row) => row.name === params.criterion);
    return { ...EXPORT.options[number], criterion: chosen ? chosen.text : "" };
  }
  if (question === "criteria") return EXPORT.criteria[number][params.by || "criterion"][params.split || ""];
  const { rows, axes } = await load(`samples-${number}.js`);
  const whole = async (row) => (await load(`steps/${number}-${row.step}.js`))[row.id];
  if (question === "sample") {
    const row = rows[Number(params.open)];
    const same = rows.filter((other) => other.prompt_id === row.prompt_id && other.split === row.split);
    return { row: await whole(row), same, keys: row.criteria, labels: {} };
  }
  const verdict = { met: (r, k) => r.self[k] === "1", unmet: (r, k) => r.self[k] === "0", unscorable: (r, k) => r.self[k] === "?", differ: differs };
  const of = (name, get) => !params[name] || get(params[name]);
  let found = rows.filter((row) =>
    ["split", "theme"].every((name) => of(name, (wanted) => row[name] === wanted)) &&
    of("prompt", (wanted) => row.prompt_id === wanted) &&
    ["step", "reward", "tokens"].every((name) => of(name, (wanted) => within(wanted, row[name]))) &&
    of("truncated", (wanted) => row.truncated === (wanted === "yes")) &&
    (!(params.criterion || params.axis || params.verdict) || row.criteria.some((key, k) =>
      of("criterion", (wanted) => key === wanted) && of("axis", (wanted) => axes[key] === wanted) &&
      of("verdict", (wanted) => verdict[wanted](row, k)))));
  if (params.text) {
    const kept = [];
    for (const row of found) {
      const all = await whole(row);
      const text = [...all.prompt.map((turn) => turn.content), all.completion, ...all.criteria.map((c) => c.explanation)].join("\n");
      if (text.toLowerCase().includes(params.text.toLowerCase())) kept.push(row);
    }
    found = kept;
  }
  const sort = params.sort || "-id", key = sort.replace("-", ""), way = sort[0] === "-" ? -1 : 1;
  found.sort((a, b) => (a[key] === null) - (b[key] === null) || way * (a[key] - b[key]) || a.id - b.id);
  const known = found.map((row) => row.reward).filter((reward) => reward !== null);
  const start = 50 * Number(params.page || 0);
  return { rows: found.slice(start, start + 50), total: found.length, mean: mean(known), size: 50 };
}
