// From a word to tokens, from a token to latents.

import { count, el, percent, section, table, visible } from "./dom.js";
import { latentHref, latentName, latentsOf, MODES, moduleNumber, run, vocabulary } from "./data.js";

const SHOWN = 200;

export async function searchPage(query = "") {
  const named = query.trim().match(/^(\w+_\d+)[\s/:.]+(\d+)$/);
  if (named && moduleNumber(named[1]) >= 0 && Number(named[2]) < run.latents) {
    location.replace(latentHref(moduleNumber(named[1]), Number(named[2])));
    return { title: query, content: [] };
  }
  const { texts, counts } = await vocabulary(), wanted = query.trim().toLowerCase();
  const found = texts.map((text, id) => ({ id, text, low: text.trim().toLowerCase() }))
    .filter(({ low, text }) => wanted ? low.includes(wanted) : text === query && query !== "");
  const closeness = ({ low }) => low === wanted ? 0 : low.startsWith(wanted) ? 1 : 2;
  found.sort((a, b) => closeness(a) - closeness(b) || counts[b.id] - counts[a.id] || a.id - b.id);
  const rows = found.slice(0, SHOWN).map(({ id, text }) => [el("a", { href: `#/token/${id}`, class: "token" }, visible(text)), String(id), count(counts[id])]);
  return {
    title: `“${query}”`,
    content: [
      el("h1", {}, `Tokens with “${query}”`),
      rows.length ? table(["token", "id", "in this text"], rows, { id: "found" })
        : el("p", { class: "note" }, "No token has that text. For a latent, give its module and number: mlp_2/137."),
      found.length > SHOWN ? el("p", { class: "faint" }, `The first ${SHOWN} of ${count(found.length)}.`) : null,
    ].filter(Boolean),
    up: "#/",
  };
}

export async function tokenPage(id) {
  const { texts, counts } = await vocabulary(), token = Number(id);
  if (!(token in texts)) throw new Error(`There is no token ${id}.`);
  const found = await latentsOf(token);
  const lists = run.modes.map((mode) => section(`Latents, ${MODES[mode]}`, found[mode]
    ? table(["latent", "share"], found[mode].map(([m, i, share]) => [el("a", { href: latentHref(m, i, mode) }, latentName(m, i)), percent(share)]))
    : el("p", { class: "faint" }, "No latent has it among its strongest tokens.")));
  return {
    title: `token ${texts[token]}`,
    content: [
      el("h1", {}, "Token ", el("span", { class: "token" }, visible(texts[token]))),
      el("p", {}, `Id ${token}, ${count(counts[token])} times in this text. The share says how much of a latent's summed activation falls on it.`),
      el("div", { class: "columns" }, lists),
    ],
    up: "#/",
    next: token + 1 in texts ? `#/token/${token + 1}` : null,
    previous: token ? `#/token/${token - 1}` : null,
  };
}
