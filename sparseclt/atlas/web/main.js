// Which page is shown, and the keys.

import { el } from "./dom.js";
import { run, start } from "./data.js";
import { overview, modules } from "./overview.js";
import { modulePage } from "./module.js";
import { latentPage } from "./latent.js";
import { graphPage, graphsPage } from "./graph.js";
import { searchPage, tokenPage } from "./search.js";

const PAGES = { "": overview, modules, module: modulePage, latent: latentPage, search: searchPage, token: tokenPage, graphs: graphsPage, graph: graphPage };
const main = document.getElementById("page"), query = document.getElementById("query");
const scrolled = new Map();
let shown = { hash: null }, clicked = false, asked = 0;

async function show() {
  const hash = location.hash || "#/", turn = ++asked;
  let page;
  try {
    const [name, ...rest] = hash.slice(2).split("/").map(decodeURIComponent);
    const make = PAGES[name];
    page = make ? await make(...rest) : missing(`There is no page ${hash}.`);
  } catch (error) {
    page = missing(error.message);
  }
  if (turn !== asked) return; // another page was asked for meanwhile
  const top = clicked ? 0 : scrolled.get(hash) ?? 0;
  shown = { hash, ...page };
  clicked = false;
  main.replaceChildren(...page.content);
  document.title = `${page.title} · ${run.name}`;
  document.body.dataset.page = hash; // once all of it is there
  if (document.activeElement !== query) main.focus({ preventScroll: true });
  scrollTo(0, top);
}

function missing(message) {
  return { title: "Not found", content: [el("h1", {}, "Not found"), el("p", { class: "note" }, message)] };
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  const go = { j: shown.next, ArrowRight: shown.next, k: shown.previous, ArrowLeft: shown.previous, u: shown.up, m: shown.other }[event.key];
  if (go) {
    clicked = true;
    location.hash = go;
  } else if (event.key === "/") query.focus();
  else if (event.key === "?") document.getElementById("keys").showModal();
  else return;
  event.preventDefault();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
}

function remembered() {
  try {
    return localStorage.getItem("theme");
  } catch (error) {
    return null; // storage may be switched off
  }
}

const dark = matchMedia("(prefers-color-scheme: dark)");
theme(remembered() ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  theme(name);
  try {
    localStorage.setItem("theme", name);
  } catch (error) {
    // As above: the choice then lasts as long as the page.
  }
});
document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  clicked = true;
  location.hash = `#/search/${encodeURIComponent(query.value)}`;
  query.blur();
});
document.addEventListener("click", (event) => {
  if (event.target.closest("a")) clicked = true;
});
document.addEventListener("keydown", keys);
addEventListener("scroll", () => shown.hash && scrolled.set(shown.hash, scrollY), { passive: true });
addEventListener("hashchange", show);

try {
  await start();
  document.getElementById("home").textContent = run.name;
  document.getElementById("graphs").hidden = !run.graphs;
  await show();
} catch (error) {
  main.replaceChildren(el("p", { class: "note" }, `The atlas cannot be read: ${error.message}. Open it with "sparseclt atlas": a page opened from a file may not read others.`));
}
