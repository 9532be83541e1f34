// One latent: where it fires, what it writes, what it reads and what reads it.

import { count, el, number, percent, section, short, signed, table, visible } from "./dom.js";
import { latent, latentHref, latentName, MODES, moduleNumber, place, run, vocabulary } from "./data.js";
import { barChart } from "./charts.js";

const GROUPS = ["Largest values", "First quarter of its values", "Second quarter", "Third quarter", "Last quarter"];
const PARTS = 12; // contributions listed under an example

export async function latentPage(name, index, wanted) {
  const m = moduleNumber(name), i = Number(index);
  if (m < 0 || !Number.isInteger(i) || i < 0 || i >= run.latents) throw new Error(`There is no latent ${name}/${index}.`);
  const mode = run.modes.includes(wanted) ? wanted : run.modes.at(-1);
  const [data, { texts }] = await Promise.all([latent(m, i), vocabulary()]);
  const to = (j) => j >= 0 && j < run.latents ? latentHref(m, j, wanted) : null;
  const page = { m, i, mode, data, texts };
  return {
    title: latentName(m, i),
    content: [
      el("h1", {}, el("a", { href: `#/module/${name}` }, name), `/${i}`),
      el("p", { class: "row" }, steps(to, i)),
      ...deaths(data),
      el("div", { class: "latent" },
        el("div", {}, activity(page), examples(page)),
        el("div", {}, upstream(page), downstream(page), logits(page), histograms(page))),
    ],
    up: `#/module/${name}`,
    next: to(i + 1),
    previous: to(i - 1),
    other: run.modes.length > 1 ? latentHref(m, i, run.modes.find((other) => other !== mode)) : null,
  };
}

function steps(to, i) {
  return [["← k", to(i - 1)], ["j →", to(i + 1)]].map(([text, href]) => href ? el("a", { href }, text) : el("span", { class: "faint" }, text));
}

function deaths(data) {
  const dead = run.modes.filter((mode) => !data.modes[mode].fired);
  if (!dead.length) return [];
  const where = dead.length === run.modes.length ? (run.modes.length > 1 ? "either mode" : MODES[run.modes[0]]) : MODES[dead[0]];
  return [el("p", { class: "note", id: "dead" }, `Dead: it fired on none of the ${count(run.tokens)} tokens in ${where}.`)];
}

function activity({ data }) {
  const rows = run.modes.map((mode) => {
    const { fired, largest, mean } = data.modes[mode];
    return [MODES[mode], number(fired / run.tokens, percent(fired / run.tokens)), number(fired, count(fired)), fired ? number(mean) : "–", fired ? number(largest) : "–"];
  });
  return section("Activity", table(["mode", "frequency", "tokens", "mean when active", "largest"], rows, { id: "activity" }));
}

function histograms({ data }) {
  const live = run.modes.filter((mode) => data.modes[mode].fired);
  return live.length ? section("Its values", live.map((mode) => barChart(MODES[mode], data.modes[mode].histogram, 0, data.modes[mode].largest))) : null;
}

function logits({ data, texts }) {
  if (!data.logits) return null;
  const box = el("div", { id: "logits" });
  const draw = (n) => {
    const { top, top_values, bottom, bottom_values } = data.logits[n];
    const cell = (ids, values, r) => [el("a", { href: `#/token/${ids[r]}`, class: "token" }, visible(texts[ids[r]])), number(values[r], signed(values[r]))];
    box.replaceChildren(table(["top", "", "bottom", ""], top.map((_, r) => [...cell(top, top_values, r), ...cell(bottom, bottom_values, r)])));
  };
  const choice = el("select", { "aria-label": "Target layer", onchange: (event) => draw(Number(event.target.value)) },
    data.logits.map(({ layer }, n) => el("option", { value: n }, layer === null ? "all target layers" : `to layer ${layer}`)));
  draw(0);
  return section("Logits of its decoders",
    el("p", { class: "faint" }, "Per unit of activation, through the final norm's gain and the unembedding, before the norm's scale divides; relative to the mean of the vocabulary."),
    choice, box);
}

const HEAD = ["latent", "V", "mean contribution", "co-active"];

function connection(id, V, mean, together) {
  const [m, i] = place(id);
  return [
    el("a", { href: latentHref(m, i) }, latentName(m, i)),
    el("span", { class: V < 0 ? "minus" : "plus" }, number(V, signed(V))),
    number(mean, signed(mean)), number(together, percent(together)),
  ];
}

function upstream({ data, m }) {
  if (!data.upstream) return run.modules[m].upstream ? null : section("Upstream connections", el("p", { class: "faint" }, "Nothing is upstream of this module."));
  const { latent: ids, V, mean, together } = data.upstream;
  const order = ids.map((_, c) => c).filter((c) => ids[c] >= 0).sort((a, b) => Math.abs(mean[b]) - Math.abs(mean[a]) || Math.abs(V[b]) - Math.abs(V[a]));
  return section(`Upstream connections (${order.length})`,
    el("p", { class: "faint" }, "Over the tokens on which this latent fires in sparsely-connected mode: the mean of V z / scale, and the share on which the upstream latent fires too."),
    table(HEAD, order.map((c) => connection(ids[c], V[c], mean[c], together[c])), { id: "upstream" }));
}

function downstream({ data }) {
  if (!run.modes.includes("sparse")) return null;
  const { count: all, latent: ids, V, mean, together } = data.downstream;
  return section(`Downstream connections (${count(all)})`,
    el("p", { class: "faint" }, `The latents that read this one${all > ids.length ? `, the ${ids.length} with the largest contributions` : ""}; statistics over the tokens on which they fire.`),
    ids.length ? table(HEAD, ids.map((id, c) => connection(id, V[c], mean[c], together[c])), { id: "downstream" }) : null);
}

function examples(page) {
  const { m, i, mode, data } = page, { examples: all } = data.modes[mode];
  const buttons = run.modes.map((name) => el("a", { href: latentHref(m, i, name), "aria-current": name === mode ? "true" : null }, MODES[name]));
  const groups = GROUPS.map((title, group) => {
    const some = all.filter((example) => example.group === group);
    return some.length ? [el("h3", {}, title), some.map((example) => exampleRow(page, example))] : null;
  });
  return el("section", { id: "examples" }, el("h2", {}, "Examples"), el("p", { class: "row" }, buttons), groups);
}

function exampleRow(page, example) {
  const { data, mode, texts } = page, { largest } = data.modes[mode];
  const tokens = example.tokens.map((id, n) => {
    const value = example.values[n], peak = example.start + n === example.position;
    return el("a", {
      href: `#/token/${id}`, class: peak ? "peak" : null, "--a": value ? (0.15 + 0.75 * value / largest).toFixed(3) : null,
      title: value ? `${latentName(page.m, page.i)}: ${short(value)}` : null, "data-value": value || null,
    }, shownToken(texts[id]));
  });
  return el("div", { class: "example" },
    el("div", { class: "text" }, tokens),
    el("div", { class: "row faint" }, number(example.value), ` row ${example.row}, position ${example.position}`),
    example.contributions ? contributions(page, example) : null);
}

function shownToken(text) {
  return text === "\n" ? "⏎\n" : text.replace(/\r?\n/g, "⏎") || "∅";
}

function contributions({ data }, example) {
  const { latent: ids } = data.upstream, parts = example.contributions;
  const sum = parts.reduce((a, b) => a + b, 0), bias = data.bias;
  const all = parts.map((value, c) => ({ value, id: ids[c] })).filter((part) => part.value !== 0).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rows = [{ name: "embedding, attention, biases", value: example.rest }, { name: "bias of the encoder", value: bias },
    ...all.slice(0, PARTS).map(({ value, id }) => ({ name: el("a", { href: latentHref(...place(id)) }, latentName(...place(id))), value }))];
  const rest = all.slice(PARTS).reduce((a, b) => a + b.value, 0);
  if (all.length > PARTS) rows.push({ name: `${all.length - PARTS} more connections`, value: rest });
  const high = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-30);
  const meter = (value) => el("span", { class: value < 0 ? "meter minus" : "meter", "--size": Math.abs(value) / high });
  return el("details", {},
    el("summary", {}, `${signed(sum)} from ${all.length} connections, ${signed(example.rest)} from the embedding, attention and biases, ${signed(bias)} bias`),
    table(["part", "contribution", ""], rows.map(({ name, value }) => [name, number(value, signed(value)), meter(value)]), { class: "parts" }));
}
