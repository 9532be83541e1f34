// Elements. Text only ever enters the page as text nodes.

const SVG = "http://www.w3.org/2000/svg";

export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// A number as it is read, with the number itself in the attribute `value`.
export function number(value, shown = short(value)) {
  return value === null || value === undefined ? "–" : el("data", { value, title: shown === String(value) ? null : value }, shown);
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return (size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)))).replace("-", "−");
}

export function signed(value) {
  return value > 0 ? `+${short(value)}` : short(value);
}

export function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  return `${value === 0 ? "0" : value < 0.01 ? value.toExponential(1) : Number(value.toPrecision(3))} %`;
}

export function count(value) {
  return value.toLocaleString("en");
}

// The text of a token with its white space made visible.
export function visible(text) {
  return text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}

export function table(head, rows, attributes = {}) {
  return el("div", { class: "scroll" }, el("table", attributes,
    el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell)))))));
}

export function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), children);
}
