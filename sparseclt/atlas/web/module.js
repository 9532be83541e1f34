// One module: its latents in a table.

import { count, el, number, percent, section, short, table, visible } from "./dom.js";
import { latentHref, load, MODES, moduleNumber, run, vocabulary } from "./data.js";
import { barChart } from "./charts.js";

const SHOWN = 100;

export async function modulePage(name, sort = "latent", page = "0") {
  const m = moduleNumber(name);
  if (m < 0) throw new Error(`There is no module ${name}.`);
  const module = run.modules[m], data = await load(`modules/${m}`), { texts } = await vocabulary();
  const mode = run.modes.at(-1), order = sorted(data, sort, mode), first = SHOWN * Number(page);
  const to = (by, number) => `#/module/${name}/${by}/${number}`;
  const head = (title, by) => el("a", { href: to(by, 0), "aria-current": by === sort ? "true" : null }, by === sort ? `${title} ↓` : title);
  const rows = order.slice(first, first + SHOWN).map((i) => [
    el("a", { href: latentHref(m, i) }, `${name}/${i}`),
    ...run.modes.map((mode) => frequency(data.fired[mode][i])),
    ...run.modes.map((mode) => data.fired[mode][i] ? number(data.largest[mode][i]) : "–"),
    count(data.downstream[i]),
    data.token[mode][i] < 0 ? "–" : el("span", { class: "token" }, visible(texts[data.token[mode][i]])),
  ]);
  const pages = el("p", { class: "row" },
    first > 0 ? el("a", { href: to(sort, Number(page) - 1) }, "← previous") : null,
    `${count(first + 1)} to ${count(Math.min(first + SHOWN, order.length))} of ${count(order.length)}`,
    first + SHOWN < order.length ? el("a", { href: to(sort, Number(page) + 1) }, "next →") : null);
  const dead = run.modes.map((mode) => `${count(module.dead[mode])} dead in ${MODES[mode]}`).join(", ");
  return {
    title: name,
    content: [
      el("h1", {}, name),
      el("p", {}, `${count(run.latents)} latents: ${dead}. ${module.upstream ? `${count(module.upstream)} latents upstream.` : "Nothing upstream: both modes are the same here."}`),
      el("div", { class: "columns" }, run.modes.map((mode) => frequencies(data.fired[mode], mode))),
      section("Latents", pages, table([
        head("latent", "latent"),
        ...run.modes.map((mode) => head(`frequency, ${mode}`, `frequency-${mode}`)),
        ...run.modes.map((mode) => head(`largest, ${mode}`, `largest-${mode}`)),
        head("read by", "downstream"), "fires most on",
      ], rows, { id: "latents" })),
    ],
    up: "#/modules",
    next: run.modules[m + 1] && `#/module/${run.modules[m + 1].name}`,
    previous: run.modules[m - 1] && `#/module/${run.modules[m - 1].name}`,
  };
}

function frequency(fired) {
  return fired ? number(fired / run.tokens, percent(fired / run.tokens)) : el("span", { class: "faint" }, "dead");
}

function sorted(data, sort) {
  const order = Array.from({ length: run.latents }, (_, i) => i);
  const [by, mode] = sort.split("-");
  const values = { frequency: data.fired[mode], largest: data.largest[mode], downstream: data.downstream }[by];
  return values ? order.sort((a, b) => values[b] - values[a]) : order;
}

function frequencies(fired, mode) {
  const alive = fired.filter((n) => n > 0).map((n) => Math.log10(n / run.tokens));
  if (!alive.length) return null;
  const low = Math.floor(-Math.log10(run.tokens)), counts = new Array(-4 * low).fill(0);
  for (const value of alive) counts[Math.min(Math.floor((value - low) * 4), counts.length - 1)] += 1;
  return barChart(`Live latents by frequency, ${MODES[mode]}`, counts, low, 0, { xLabel: "log10 of the share of tokens on which it fires" });
}
