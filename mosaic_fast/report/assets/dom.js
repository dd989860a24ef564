// Elements are made here and nowhere else. Text of a run reaches the document as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

// Characters that hide or reorder what is written are shown by name, so that a reader sees what the judge saw.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;
const LONE = /[\ud800-\udfff]/gu;  // with the u flag: surrogates without a partner
const named = (character) => `\u27e8U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
const visible = (text) => String(text ?? "").replace(UNSEEN, named).replace(LONE, named);

const percent = (value) => `${+(100 * value).toFixed(1)}%`;

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(+value.toPrecision(3)).replace("-", "\u2212");
}

const signed = (value) => (value === null || value === undefined ? "\u2013" : `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`);
