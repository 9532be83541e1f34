// The run: its figures, its curves, its modules.

import { count, el, number, percent, section, short, signed, table } from "./dom.js";
import { MODES, run } from "./data.js";
import { lineChart, matrix } from "./charts.js";

const COLUMNS = [
  ["fvu_vanilla", "FVU vanilla", short], ["fvu_sparse", "FVU sparse", short], ["excess_fvu", "excess FVU", signed],
  ["connections_in_effect", "connections in effect", short], ["l0_vanilla", "L0 vanilla", short], ["l0_sparse", "L0 sparse", short],
  ["dead_vanilla", "dead vanilla", percent], ["dead_sparse", "dead sparse", percent],
];
const RUNS = [["model", "the model itself"], ["vanilla", "replaced, vanilla mode"], ["sparse", "replaced, sparsely-connected mode"], ["zero_ablated", "zero-ablated"]];

export function overview() {
  const { architecture: a, evaluation: e } = run;
  const content = [
    el("h1", {}, run.name),
    el("p", {}, `A cross-layer transcoder of ${a.model.name.startsWith("/") ? a.model.name.split("/").pop() : a.model.name}: ${run.modules.length} modules of ${count(run.latents)} latents, ` +
      `${a.active} active per token${e && e.C ? `, ${e.C} connections per latent` : ""}. The pages of latents show ` +
      `${count(run.tokens)} tokens of the ${run.split === "train" ? "training" : "held-out"} text.`),
    run.modes.includes("sparse") ? null : el("p", { class: "note" }, "This run has no connections: only vanilla mode is shown."),
    modulesTable(),
  ];
  if (e?.cross_entropy) content.push(crossEntropies(e.cross_entropy));
  content.push(section("Training", el("div", { class: "columns" }, curves())));
  if (e?.fvu_against_C?.length) content.push(againstC(e));
  content.push(configuration());
  return { title: "Overview", content: content.filter(Boolean), next: "#/modules" };
}

export function modules() {
  const content = [el("h1", {}, "Modules"), modulesTable()];
  if (run.flow) content.push(section("Which modules read which",
    el("p", { class: "faint" }, "Mean over tokens of the summed size of the contributions that a module (row) takes from an earlier one (column), in sparsely-connected mode."),
    matrix("Contributions between modules", run.modules.map((m) => m.name), run.flow)));
  return { title: "Modules", content, up: "#/", next: `#/module/${run.modules[0].name}` };
}

function modulesTable() {
  const measured = new Map((run.evaluation?.modules ?? []).map((m) => [m.name, m]));
  const rows = run.modules.map((module) => {
    const m = measured.get(module.name) ?? {};
    return [el("a", { href: `#/module/${module.name}` }, module.name), ...COLUMNS.map(([key, , shown]) => number(m[key], shown(m[key])))];
  });
  const mean = run.evaluation?.mean;
  if (mean) rows.push(["mean", ...COLUMNS.map(([key, , shown]) => number(mean[key], shown(mean[key])))]);
  return section("Evaluation", run.evaluation
    ? el("p", { class: "faint" }, `On ${count(run.evaluation.tokens)} held-out tokens. FVU: fraction of variance unexplained.`)
    : el("p", { class: "note" }, "This run has not been evaluated: sparseclt eval RUN."),
  table(["module", ...COLUMNS.map((c) => c[1])], rows, { id: "evaluation" }));
}

function crossEntropies(entropies) {
  const worst = entropies.zero_ablated, best = entropies.model;
  const rows = RUNS.filter(([key]) => entropies[key] !== null && entropies[key] !== undefined)
    .map(([key, name]) => [name, number(entropies[key], entropies[key].toFixed(4)), percent((worst - entropies[key]) / (worst - best))]);
  return section("Next-token cross-entropy", table(["run", "nats per token", "loss recovered"], rows));
}

function curves() {
  const { metrics } = run, steps = metrics.step ?? [];
  const line = (name, title) => ({ name: title ?? name, x: steps, y: metrics[name] ?? [] });
  return [
    lineChart("FVU, mean of the modules (log scale)", [line("fvu_vanilla", MODES.vanilla), line("fvu_sparse", MODES.sparse)], { xLabel: "step", logY: true }),
    lineChart("Loss (log scale)", [line("loss")], { xLabel: "step", logY: true }),
    lineChart("Share of dead latents", [line("dead_vanilla", MODES.vanilla), line("dead_sparse", MODES.sparse)], { xLabel: "step" }),
  ].filter(Boolean);
}

function againstC(e) {
  const x = e.fvu_against_C.map((p) => p.C);
  return section("FVU against connections per latent",
    el("p", { class: "faint" }, "The trained weights with their connections chosen anew for each C, not trained on."),
    lineChart("FVU against C (log scales)", [
      { name: MODES.vanilla, x, y: e.fvu_against_C.map((p) => p.fvu_vanilla) },
      { name: MODES.sparse, x, y: e.fvu_against_C.map((p) => p.fvu_sparse) },
    ], { xLabel: "C", logX: true, logY: true }));
}

function configuration() {
  const flat = (object, prefix = "") => Object.entries(object ?? {}).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${key}.`) : [[prefix + key, JSON.stringify(value)]]);
  return el("details", {}, el("summary", {}, "Configuration"), el("dl", {}, flat(run.config).map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])));
}
