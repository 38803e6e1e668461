// Line charts and bars as SVG.
"use strict";

const COLOURS = 7;

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// lines: [{label, points: [[step, value]], colour}]; values above `most` are cut off. Pointing at the chart shows the values of that step.
function lineChart(title, note, lines, fraction = false, most = Infinity) {
  lines = lines.filter((line) => line.points.length);
  if (!lines.length) return null;
  const width = 460, height = 190, left = 52, bottom = 22, top = 8, right = 16;
  const all = lines.flatMap((line) => line.points);
  let [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  let [y0, y1] = [Math.min(...all.map((p) => p[1])), Math.min(most, Math.max(...all.map((p) => p[1])))];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  const margin = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 0.1;
  [y0, y1] = fraction ? [0, Math.max(Math.min(1.02, y1 * 1.15), 0.01)] : [y0 - margin, y1 + margin];
  const x = (step) => left + (step - x0) / (x1 - x0) * (width - left - right);
  const y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - bottom - top);
  const path = (points) => "M" + points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L");
  const means = (points) => {
    const window = Math.max(Math.floor(points.length / 20), 3);
    return points.map(([step], end) => {
      const part = points.slice(Math.max(0, end + 1 - window), end + 1);
      return [step, part.reduce((sum, p) => sum + p[1], 0) / part.length];
    });
  };
  const cursor = h("line.cursor", { y1: top, y2: height - bottom, x1: -9, x2: -9 });
  const values = lines.map((line) => h("b", number(line.points.at(-1)[1])));
  const when = h("span.muted");
  const svg = h("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    ticks(y0, y1, 4).map((at) => [
      h("line.grid", { x1: left, x2: width - right, y1: y(at), y2: y(at) }),
      h("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, minus(at))]),
    ticks(x0, x1, 6).filter(Number.isInteger).map((at) => h("text", { x: x(at), y: height - 5, "text-anchor": "middle" }, String(at))),
    lines.map((line) => {
      const colour = `s${line.colour % COLOURS}`, points = line.points, dots = points.length < 16 ? points : [];
      return [points.length > 40 && h("path", { class: `line faint ${colour}`, d: path(points) }),
        h("path", { class: `line ${colour}`, d: path(points.length > 40 ? means(points) : points) }),
        dots.map((point) => h("circle", { class: `dot ${colour}`, cx: x(point[0]), cy: y(point[1]), r: 2.6 }))];
    }),
    cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = x0 + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (x1 - x0);
    const near = (points) => points.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best);
    const step = near(all)[0];
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    when.textContent = `step ${step}`;
    lines.forEach((line, i) => {
      const found = line.points.find((p) => p[0] === step);
      values[i].textContent = found ? number(found[1]) : "–";
    });
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    when.textContent = "";
    lines.forEach((line, i) => { values[i].textContent = number(line.points.at(-1)[1]); });
  });
  const ends = (line) => [line.points[0], line.points.at(-1)].map(([step, value]) => `${number(value)} at step ${step}`);
  const said = lines.map((line) => `${line.label}: ${ends(line).join(", ")}`);
  return h("figure.panel",
    h("figcaption", h("h3", title), when), h("p.note", note),
    h("ul.legend", lines.map((line, i) => h("li", { class: `s${line.colour % COLOURS}` }, line.label, " ", values[i]))),
    h("div", { role: "img", "aria-label": `${title}. ${said.join("; ")}.` }, svg));
}

// A small curve of [[bin, value from 0 to 1]].
function spark(curve) {
  if (!curve || curve.length < 2) return "";
  const last = curve.at(-1)[0] || 1;
  const d = "M" + curve.map(([bin, value]) => `${(bin / last * 70 + 2).toFixed(1)},${(16 - value * 14).toFixed(1)}`).join("L");
  return h("svg.spark", { viewBox: "0 0 74 18", "aria-hidden": "true" }, h("path.line.s0", { d }));
}
