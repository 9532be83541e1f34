// The pinned nodes and supernodes by themselves, with the summed weights between them.

import { el, signed, svg } from "./dom.js";

const WIDTH = 460, ROW = 64, BOX = 120;

// groups: [{title, ids, height}]
export function subgraph(groups, links) {
  const heights = [...new Set(groups.map((group) => group.height))].sort((a, b) => b - a);
  const places = groups.map((group) => {
    const level = groups.filter((other) => other.height === group.height);
    return [WIDTH * (level.indexOf(group) + 0.5) / level.length, heights.indexOf(group.height) * ROW + 24];
  });
  const owner = new Map(groups.flatMap(({ ids }, n) => ids.map((id) => [id, n])));
  const sums = new Map();
  for (const { source, target, weight } of links) {
    const [from, to] = [owner.get(source), owner.get(target)];
    if (from === undefined || to === undefined || from === to) continue;
    const key = `${from} ${to}`;
    sums.set(key, (sums.get(key) ?? 0) + weight);
  }
  const top = Math.max(...[...sums.values()].map(Math.abs), 1e-30);
  const edges = [...sums].map(([key, weight]) => {
    const [[x1, y1], [x2, y2]] = key.split(" ").map((n) => places[n]);
    return svg("path", { class: `edge near ${weight < 0 ? "minus" : "plus"}`, d: `M${x1},${y1} L${x2},${y2}`, "stroke-width": 0.6 + 4 * Math.abs(weight) / top },
      svg("title", {}, `${groups[key.split(" ")[0]].title} → ${groups[key.split(" ")[1]].title}: ${signed(weight)}`));
  });
  const boxes = groups.map(({ title, ids }, n) => {
    const room = Math.min(BOX, WIDTH / groups.filter((other) => other.height === groups[n].height).length - 6);
    const most = Math.max(3, Math.floor(room / 6));
    return svg("g", { class: "box", transform: `translate(${places[n][0]} ${places[n][1]})` }, svg("title", {}, title),
      svg("rect", { x: -room / 2, y: -14, width: room, height: 28, rx: 5 }),
      svg("text", { y: 4, "text-anchor": "middle" }, title.length > most ? `${title.slice(0, most - 1)}…` : title));
  });
  return el("figure", {}, el("figcaption", {}, "Summed weights between them"),
    svg("svg", { id: "subgraph", viewBox: `0 0 ${WIDTH} ${heights.length * ROW}`, role: "img", "aria-label": "Pinned nodes" }, edges, boxes));
}
