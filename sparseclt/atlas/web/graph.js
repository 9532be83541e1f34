// The graph of a prompt: nodes by token and layer, edges of the node that was clicked, pinned nodes and groups of them.

import { count, el, number, percent, section, short, signed, svg, table, visible } from "./dom.js";
import { latentHref, load, moduleNumber, run } from "./data.js";
import { subgraph } from "./subgraph.js";

const CELL = 13, ROW = 46, LEFT = 90, BOTTOM = 70, BACKGROUND = 250, LISTED = 40;
const INPUTS = { embedding: "embeddings", attention: "frozen attention", error: "errors", layers: "layers not covered" };
const SHAPES = { embedding: "square", logit: "square", bias: "square", "mlp reconstruction error": "diamond", "lorsa error": "diamond" };

export async function graphsPage() {
  const graphs = run.graphs ? await load("graphs") : [];
  const rows = graphs.map(({ slug, prompt, nodes, edges }) => [el("a", { href: `#/graph/${encodeURIComponent(slug)}` }, prompt), count(nodes), count(edges)]);
  return {
    title: "Graphs",
    content: [el("h1", {}, "Graphs of prompts"), rows.length ? table(["prompt", "nodes", "edges"], rows, { class: "wrap", id: "prompts" })
      : el("p", { class: "note" }, 'There is none yet. Make one with: sparseclt graph RUN "prompt", then open the atlas again.')],
    up: "#/",
  };
}

export async function graphPage(slug, state = "") {
  const graph = await load(`graphs/${encodeURIComponent(slug)}`);
  const view = new View(slug, graph, new URLSearchParams(state));
  return { title: graph.metadata.prompt, content: view.content(), up: "#/graphs" };
}

class View {
  constructor(slug, { metadata, nodes, links, qParams }, state) {
    Object.assign(this, { slug, metadata, nodes, links });
    this.byId = new Map(nodes.map((node) => [node.node_id, node]));
    this.into = Map.groupBy ? Map.groupBy(links, (link) => link.target) : grouped(links, "target");
    this.outOf = Map.groupBy ? Map.groupBy(links, (link) => link.source) : grouped(links, "source");
    const known = (id) => this.byId.has(id);
    this.clicked = known(state.get("clickedId")) ? state.get("clickedId") : null;
    this.pinned = (state.has("pinnedIds") ? state.get("pinnedIds").split(",") : qParams?.pinnedIds ?? []).filter(known);
    this.groups = (parsed(state.get("supernodes")) ?? qParams?.supernodes ?? []).map(([label, ...ids]) => [String(label), ...ids.filter(known)]);
    this.share = Number(state.get("share")) || 1;
    this.picture = el("div", { class: "scroll", id: "picture" });
    this.side = el("div", { id: "node" });
    this.below = el("div", { id: "pins" });
  }

  content() {
    const tokens = this.metadata.prompt_tokens.map((text) => el("span", { class: "token" }, visible(text)));
    const slider = el("input", { type: "range", min: 0.05, max: 1, step: 0.01, value: this.share, "aria-label": "Share of influence shown",
      oninput: (event) => { this.share = Number(event.target.value); this.changed(); } });
    this.shownShare = el("span", {});
    this.changed();
    return [
      el("h1", {}, "Graph of a prompt"), el("p", { class: "text" }, tokens), ...this.figures(),
      el("p", { class: "row" }, "Nodes with the largest influence, together ", slider, this.shownShare),
      this.picture, this.below, this.side,
    ];
  }

  figures() {
    const ours = this.metadata.sparseclt;
    if (!ours) return [];
    const { agreement: a = {}, scores: s = {}, nodes, edges } = ours;
    const rows = [
      ["KL from the language model, last token", number(a.kl_last)], ["the same, mean over tokens", number(a.kl_mean)],
      ["same likeliest next token, share of tokens", percent(a.top1_mean)],
      ["replacement score", number(s.replacement)], ["completeness score", number(s.completeness)],
      ...Object.entries(s.input_shares ?? {}).filter(([, share]) => share > 0).map(([name, share]) => [`share of the inputs: ${INPUTS[name] ?? name}`, percent(share)]),
      ["nodes kept", `${count(nodes.kept)} of ${count(nodes.all)}`], ["edges kept", `${count(edges.kept)} of ${count(edges.all)}`],
    ].filter(([, value]) => value !== undefined);
    return [el("details", { open: true }, el("summary", {}, "How faithful the graph is"), table(["", ""], rows, { id: "faith" })),
      el("p", { class: "faint" }, this.metadata.info?.description ?? "")];
  }

  changed() {
    const state = new URLSearchParams();
    if (this.clicked) state.set("clickedId", this.clicked);
    if (this.pinned.length) state.set("pinnedIds", this.pinned.join(","));
    if (this.groups.length) state.set("supernodes", JSON.stringify(this.groups));
    if (this.share < 1) state.set("share", this.share);
    const query = state.toString();
    history.replaceState(null, "", `#/graph/${encodeURIComponent(this.slug)}${query ? `/${encodeURIComponent(query)}` : ""}`);
    if (this.shownShare) this.shownShare.textContent = percent(this.share);
    const shown = new Set(this.nodes.filter((node) => this.share >= 1 || (node.influence ?? 0) <= this.share || this.pinned.includes(node.node_id)).map((node) => node.node_id));
    const focused = document.activeElement?.dataset?.node;
    this.picture.replaceChildren(this.drawn(shown));
    if (focused) this.picture.querySelector(`[data-node="${CSS.escape(focused)}"]`)?.focus();
    this.side.replaceChildren(...this.details());
    this.below.replaceChildren(...this.pins());
  }

  click(id) {
    this.clicked = this.clicked === id ? null : id;
    this.changed();
  }

  pin(id) {
    this.pinned = this.pinned.includes(id) ? this.pinned.filter((other) => other !== id) : [...this.pinned, id];
    this.groups = this.groups.map(([label, ...ids]) => [label, ...ids.filter((other) => this.pinned.includes(other))]).filter((group) => group.length > 1);
    this.changed();
  }

  // Where each node is: by token from left to right, by layer from the embedding up.
  places(shown) {
    const rows = [...new Set(this.nodes.map((node) => node.layer))].sort((a, b) => height(a) - height(b));
    const cells = grouped(this.nodes.filter((node) => shown.has(node.node_id)), (node) => `${node.layer} ${node.ctx_idx}`);
    const widths = this.metadata.prompt_tokens.map((_, position) => Math.max(3, ...rows.map((row) => cells.get(`${row} ${position}`)?.length ?? 0)) * CELL + 12);
    const starts = widths.map((_, position) => LEFT + widths.slice(0, position).reduce((a, b) => a + b, 0));
    const at = new Map();
    for (const [key, nodes] of cells) {
      const [row, position] = [rows.indexOf(nodes[0].layer), nodes[0].ctx_idx];
      nodes.forEach((node, n) => at.set(node.node_id, [starts[position] + 12 + n * CELL, (rows.length - row - 0.5) * ROW]));
    }
    return { at, rows, starts, width: LEFT + widths.reduce((a, b) => a + b, 0), height: rows.length * ROW + BOTTOM };
  }

  drawn(shown) {
    const { at, rows, starts, width, height: high } = this.places(shown);
    const near = this.clicked ? [...(this.into.get(this.clicked) ?? []), ...(this.outOf.get(this.clicked) ?? [])] : [];
    const strongest = this.links.filter((link) => at.has(link.source) && at.has(link.target)).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, BACKGROUND);
    const top = Math.max(...near.map((link) => Math.abs(link.weight)), 1e-30);
    const edge = (link, style, size = 0.5) => at.has(link.source) && at.has(link.target) ? svg("path", {
      class: style, d: curve(at.get(link.source), at.get(link.target)), "stroke-width": size }) : null;
    const joined = new Set(near.flatMap((link) => [link.source, link.target]));
    const marks = this.nodes.filter((node) => at.has(node.node_id)).map((node) => this.mark(node, at.get(node.node_id), joined));
    return svg("svg", { class: "natural", width, height: high, viewBox: `0 0 ${width} ${high}`, role: "group", "aria-label": "Graph" },
      rows.map((row, n) => [
        svg("text", { x: 4, y: (rows.length - n - 0.5) * ROW + 4 }, rowName(row, rows)),
        svg("line", { class: "grid", x1: LEFT - 6, x2: width, y1: (rows.length - n) * ROW, y2: (rows.length - n) * ROW }),
      ]),
      this.metadata.prompt_tokens.map((text, position) => svg("text", { transform: `translate(${starts[position] + 14} ${rows.length * ROW + 12}) rotate(35)` }, visible(text))),
      strongest.map((link) => edge(link, "edge")),
      near.map((link) => edge(link, link.weight < 0 ? "edge near minus" : "edge near plus", 0.6 + 3.4 * Math.abs(link.weight) / top)),
      marks);
  }

  mark(node, [x, y], joined) {
    const id = node.node_id, shape = SHAPES[node.feature_type] ?? "circle";
    const style = ["mark", id === this.clicked && "clicked", this.pinned.includes(id) && "pinned", joined.has(id) && "joined", node.feature_type.endsWith("error") && "unexplained"];
    const form = shape === "circle" ? svg("circle", { r: 4.5 }) : svg("rect", { x: -4, y: -4, width: 8, height: 8, transform: shape === "diamond" ? "rotate(45)" : null });
    return svg("g", {
      class: style.filter(Boolean).join(" "), transform: `translate(${x} ${y})`, tabindex: 0, role: "button", "data-node": id,
      onclick: (event) => event.ctrlKey || event.metaKey || event.shiftKey ? this.pin(id) : this.click(id),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        this.click(id);
      },
    }, svg("title", {}, this.name(node)), form);
  }

  name(node) {
    const token = this.metadata.prompt_tokens[node.ctx_idx];
    return `${node.clerp || node.node_id}${["embedding", "logit", "bias"].includes(node.feature_type) ? "" : ` at “${visible(token ?? "")}”`}`;
  }

  details() {
    const node = this.byId.get(this.clicked);
    if (!node) return [el("p", { class: "faint" }, "Click a node to see what leads to it and where it leads; with Ctrl or Shift, to pin it.")];
    const module = node.site ? moduleNumber(node.site) : -1, latent = module >= 0 && Number.isInteger(node.latent);
    const list = (title, links, end) => {
      const sorted = [...(links ?? [])].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      return section(`${title} (${sorted.length})`, table(["", "weight"], sorted.slice(0, LISTED).map((link) => [
        el("button", { type: "button", class: "plain", onclick: () => this.click(link[end]) }, this.name(this.byId.get(link[end]))),
        el("span", { class: link.weight < 0 ? "minus" : "plus" }, number(link.weight, signed(link.weight))),
      ]), { class: "wrap" }));
    };
    return [
      el("h2", {}, this.name(node)),
      el("p", { class: "row" },
        latent ? el("a", { href: latentHref(module, node.latent, this.metadata.sparseclt?.mode ?? run.modes.at(-1)), id: "to-latent" }, "its page") : null,
        el("button", { type: "button", id: "pin", "aria-pressed": String(this.pinned.includes(node.node_id)), onclick: () => this.pin(node.node_id) }, "pin")),
      el("p", { class: "faint" }, node.activation === null || node.activation === undefined ? null : ["activation ", number(node.activation)],
        node.token_prob ? [" probability ", number(node.token_prob)] : null),
      el("div", { class: "columns" }, list("Inputs", this.into.get(node.node_id), "source"), list("Outputs", this.outOf.get(node.node_id), "target")),
    ];
  }

  pins() {
    if (!this.pinned.length) return [];
    const free = this.pinned.filter((id) => !this.groups.some(([, ...ids]) => ids.includes(id)));
    const chosen = new Set();
    const box = (id) => el("label", { class: "row" },
      el("input", { type: "checkbox", onchange: (event) => event.target.checked ? chosen.add(id) : chosen.delete(id) }),
      el("button", { type: "button", class: "plain", onclick: () => this.click(id) }, this.name(this.byId.get(id))));
    const label = el("input", { "aria-label": "Name of the supernode", placeholder: "name", id: "label" });
    const group = () => {
      if (chosen.size) {
        this.groups.push([label.value || "supernode", ...chosen]);
        this.changed();
      }
    };
    const names = this.groups.map(([title, ...ids], n) => el("p", { class: "row" }, el("b", {}, title), `${ids.length} nodes`,
      el("button", { type: "button", onclick: () => { this.groups.splice(n, 1); this.changed(); } }, "apart")));
    const members = [...this.groups, ...free.map((id) => [this.name(this.byId.get(id)), id])];
    return [section("Pinned", el("div", { class: "columns" },
      el("div", {}, free.map(box), free.length ? el("p", { class: "row" }, label, el("button", { type: "button", id: "group", onclick: group }, "group the ticked ones")) : null, names),
      subgraph(members.map(([title, ...ids]) => ({ title, ids, height: Math.max(...ids.map((id) => height(this.byId.get(id).layer))) })), this.links)))];
  }
}

function grouped(items, key) {
  const of = typeof key === "string" ? (item) => item[key] : key, groups = new Map();
  for (const item of items) groups.has(of(item)) ? groups.get(of(item)).push(item) : groups.set(of(item), [item]);
  return groups;
}

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) && value.every(Array.isArray) ? value : null;
  } catch (error) {
    return null; // a link that was cut short
  }
}

function height(layer) {
  return layer === "E" ? -1 : Number(layer);
}

function rowName(row, rows) {
  return row === "E" ? "embedding" : row === rows.at(-1) ? "logits" : `layer ${row}`;
}

function curve([x1, y1], [x2, y2]) {
  const middle = (y1 + y2) / 2;
  return `M${x1},${y1} C${x1},${middle} ${x2},${middle} ${x2},${y2}`;
}
