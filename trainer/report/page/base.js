"use strict";
// Helpers of all parts. Text enters the page through textContent alone.

const page = { content: null, chunks: new Map(), state: {} };
const LIGHT = ["#2a56c6", "#c8501e", "#157f63", "#8a4aa8", "#a97400", "#b3264f", "#2b8fb5", "#5f6772", "#6a8a1f", "#7a5c3e", "#d06fa6", "#3b3f8f"];
const DARK = ["#8fb0ff", "#ff9d6b", "#5fd0ab", "#cf9bee", "#e3b44f", "#ff8ba8", "#74cbee", "#b3bac6", "#b4d66a", "#cfae8b", "#f2a8d0", "#a7acf5"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(wellFormed(child));
  return node;
}

// Half of a character, as a cut text may have, is shown as U+FFFD.
const wellFormed = child => (typeof child === "string" && child.toWellFormed ? child.toWellFormed() : child);

async function unpackText(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
const unpack = async id => JSON.parse(await unpackText(id));

// The texts of some hundred groups; the last few chunks stay unpacked.
async function chunk(index) {
  if (page.chunks.has(index)) {
    const known = page.chunks.get(index);
    page.chunks.delete(index);
    page.chunks.set(index, known);
    return known;
  }
  const groups = unpack(`chunk-${index}`);
  page.chunks.set(index, groups);
  if (page.chunks.size > 48) page.chunks.delete(page.chunks.keys().next().value);
  return groups;
}

const isDark = () => document.documentElement.dataset.theme === "dark";
const color = index => (isDark() ? DARK : LIGHT)[index % LIGHT.length];
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}
const percent = value => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
function signed(value) {
  return value === null || value === undefined ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value));
}
function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes < 1) return `${Math.round(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The state of the page is in its address: a link shows the same rows.
function readState() {
  const [tab, query] = location.hash.slice(1).split("?");
  page.state = Object.fromEntries(new URLSearchParams(query || ""));
  page.tab = tab;
}
function writeState(changes) {
  page.state = { ...page.state, ...changes };
  for (const [key, value] of Object.entries(page.state)) if (value === "" || value === null) delete page.state[key];
  const query = new URLSearchParams(page.state).toString();
  history.replaceState(null, "", `#${page.tab}${query ? `?${query}` : ""}`);
}
