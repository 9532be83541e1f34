// The files of the atlas, fetched when they are first needed.

const KEPT = 40;
const files = new Map();

export const MODES = { vanilla: "vanilla mode", sparse: "sparsely-connected mode" };
export let run = null;

export async function start() {
  run = await load("run");
}

export function load(path) {
  const known = files.get(path) ?? read(`data/${path}.json.gz`);
  files.delete(path);
  files.set(path, known);
  known.catch(() => files.delete(path));
  for (const old of files.keys()) {
    if (files.size <= KEPT) break;
    if (old !== "run" && old !== "vocabulary") files.delete(old);
    else files.set(old, take(old));
  }
  return known;
}

function take(path) {
  const file = files.get(path);
  files.delete(path);
  return file;
}

async function read(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  // A host that declares the encoding has it undone by the browser.
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return JSON.parse(new TextDecoder().decode(bytes));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

export async function latent(module, index) {
  const shard = await load(`latents/${module}/${Math.floor(index / run.shard)}`);
  return shard[index % run.shard];
}

export async function vocabulary() {
  return load("vocabulary");
}

export async function latentsOf(token) {
  const shard = Math.floor(token / run.token_shard);
  try {
    return (await load(`tokens/${shard}`))[token] ?? {};
  } catch (error) {
    return {};
  }
}

export function moduleNumber(name) {
  return run.modules.findIndex((module) => module.name === name);
}

// A latent's number over all modules side by side, as [module, latent].
export function place(id) {
  return [Math.floor(id / run.latents), id % run.latents];
}

export function latentName(module, index) {
  return `${run.modules[module].name}/${index}`;
}

export function latentHref(module, index, mode) {
  return `#/latent/${latentName(module, index)}${mode ? `/${mode}` : ""}`;
}
