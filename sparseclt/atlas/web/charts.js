// Small charts in SVG, in the colours of the page.

import { el, short, svg } from "./dom.js";

const WIDTH = 420, HEIGHT = 200, LEFT = 52, BOTTOM = 34, TOP = 8, RIGHT = 10;

// lines: [{name, x, y}]; points without a y are left out.
export function lineChart(title, lines, { xLabel, yLabel, logY = false, logX = false } = {}) {
  const points = lines.flatMap((line) => line.x.map((x, i) => [x, line.y[i]])).filter(([x, y]) => good(x, logX) && good(y, logY));
  if (!points.length) return null;
  const x = scale(points.map((p) => p[0]), LEFT, WIDTH - RIGHT, logX);
  const y = scale(points.map((p) => p[1]), HEIGHT - BOTTOM, TOP, logY);
  const drawn = lines.map((line, n) => svg("polyline", {
    class: `line line-${n}`,
    points: line.x.map((v, i) => [v, line.y[i]]).filter(([a, b]) => good(a, logX) && good(b, logY))
      .map(([a, b]) => `${x.at(a).toFixed(1)},${y.at(b).toFixed(1)}`).join(" "),
  }));
  const legend = lines.length > 1 ? el("p", { class: "legend" }, lines.map((line, n) => el("span", { class: `key line-${n}` }, line.name))) : null;
  return figure(title, [axes(x, y, xLabel, yLabel), drawn], legend);
}

export function barChart(title, counts, from, to, { xLabel, logCounts = false } = {}) {
  const high = Math.max(...counts, 1);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (logCounts ? Math.log1p(value) / Math.log1p(high) : value / high);
  const step = (WIDTH - LEFT - RIGHT) / counts.length;
  const bars = counts.map((value, i) => svg("rect", {
    class: "bar", x: LEFT + i * step + 0.5, y: y(value), width: Math.max(step - 1, 1), height: HEIGHT - BOTTOM - y(value),
  }, svg("title", {}, `${short(from + (to - from) * i / counts.length)} to ${short(from + (to - from) * (i + 1) / counts.length)}: ${value}`)));
  const x = scale([from, to], LEFT, WIDTH - RIGHT, false);
  const ticks = [0, high].map((value) => svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  return figure(title, [xAxis(x, xLabel), ticks, bars]);
}

// Rows read columns; empty where a row cannot.
export function matrix(title, names, values) {
  const high = Math.max(...values.flat(), 1e-30), cell = Math.max(10, Math.min(34, 380 / names.length)), left = 60;
  const side = left + cell * names.length + 4;
  const squares = values.flatMap((row, m) => row.map((value, u) => value > 0 ? svg("rect", {
    class: "heat", x: left + u * cell, y: 4 + m * cell, width: cell - 1, height: cell - 1, "fill-opacity": (value / high).toFixed(3),
  }, svg("title", {}, `${names[m]} from ${names[u]}: ${short(value)}`)) : null));
  const every = Math.ceil(12 / cell);
  const labels = names.flatMap((name, i) => i % every ? [] : [
    svg("text", { x: left - 5, y: 4 + (i + 0.7) * cell, "text-anchor": "end" }, name),
    svg("text", { x: left + (i + 0.5) * cell, y: 16 + cell * names.length, "text-anchor": "middle" }, name.replace(/^.*_/, "")),
  ]);
  return el("figure", {}, el("figcaption", {}, title), svg("svg", { class: "natural", width: side, viewBox: `0 0 ${side} ${side - left + 20}`, role: "img", "aria-label": title }, squares, labels));
}

function figure(title, parts, legend = null) {
  return el("figure", {}, el("figcaption", {}, title), svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title }, parts.flat(Infinity)), legend);
}

function good(value, log) {
  return Number.isFinite(value) && (!log || value > 0);
}

function scale(values, from, to, log) {
  const map = log ? Math.log : (v) => v;
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const at = (value) => from + (to - from) * (map(value) - map(low)) / (map(high) - map(low));
  return { at, ticks: log ? logTicks(low, high) : linearTicks(low, high) };
}

function linearTicks(low, high) {
  const rough = (high - low) / 4, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n++) ticks.push(Number((n * step).toPrecision(6)));
  return ticks;
}

function logTicks(low, high) {
  const many = high / low > 1000 ? [1] : high / low > 20 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const n of many) {
      const value = Number((n * 10 ** power).toPrecision(3));
      if (value >= low && value <= high) ticks.push(value);
    }
  return ticks.length ? ticks : [low];
}

function xAxis(x, label) {
  return [
    svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }),
    x.ticks.map((value) => svg("text", { x: x.at(value), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, short(value))),
    label ? svg("text", { class: "label", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, label) : null,
  ];
}

function axes(x, y, xLabel, yLabel) {
  return [
    y.ticks.map((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(value), y2: y.at(value) }),
      svg("text", { x: LEFT - 5, y: y.at(value) + 4, "text-anchor": "end" }, short(value)),
    ]),
    xAxis(x, xLabel),
    yLabel ? svg("text", { class: "label", x: 0, y: 0, transform: `translate(11 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel) : null,
  ];
}
