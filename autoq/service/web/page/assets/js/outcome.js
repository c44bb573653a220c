// What a job came to: names and values, tables where there are many of a kind.

import { definitions, el, link, table } from "./dom.js";
import { bitsText, bytesText, lossText, metricText, metricValueText, plural, secondsText, unitText } from "./numbers.js";

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isNothing = (value) => value === null || value === "" || (Array.isArray(value) && !value.length) || (isObject(value) && !Object.keys(value).length);
const words = (name) => String(name).replaceAll("_", " ");

/** What a job's result says; null where it has none. */
export function outcomeOf(job) {
  if (isNothing(job.result ?? null)) return null;
  const { layers, ...further } = job.result;
  const isCheck = job.kind === "verify" && Array.isArray(layers);
  return [definitions(rowsOf(isCheck ? further : job.result)), isCheck ? checkedLayers(layers) : null];
}

function rowsOf(result) {
  const found = Object.entries(result).filter(([, value]) => !isNothing(value));
  return found.flatMap(([name, value]) => (name === "measured" && isObject(value) ? metrics(value) : [[words(name), valueOf(name, value)]]));
}

const metrics = (measured) => Object.entries(measured).map(([metric, value]) => [metricText(metric), metricValueText(metric, value)]);

function valueOf(name, value) {
  if (Array.isArray(value)) return listOf(name, value);
  if (isObject(value)) return definitions(rowsOf(value));
  if (name === "unit") return unitText(value);
  if (name === "study") return link(`/studies/${encodeURIComponent(value)}`, value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (name.endsWith("bytes")) return bytesText(value);
  if (name.endsWith("bits")) return bitsText(value);
  if (name === "seconds") return secondsText(value);
  return Number.isInteger(value) ? String(value) : lossText(value);
}

function listOf(name, values) {
  if (!values.some((value) => typeof value === "object")) return values.join(", ");
  const columns = [...new Set(values.flatMap((value) => Object.keys(value ?? {})))].filter((column) => values.some((value) => !isNothing(value?.[column] ?? null)));
  const rows = values.map((value) => columns.map((column) => (isNothing(value?.[column] ?? null) ? "" : valueOf(column, value[column]))));
  return el("details", {}, el("summary", {}, String(values.length)), el("div.scroll", {}, table(columns.map(words), rows, { caption: words(name) })));
}

/** What each engine does with the layers of a checkpoint; those with which it does the same are one row. */
function checkedLayers(layers) {
  const alike = new Map();
  for (const { module, stored, outcomes } of layers) {
    for (const [target, { does, reason }] of Object.entries(outcomes)) {
      const key = JSON.stringify([target, stored, does, reason]);
      if (!alike.has(key)) alike.set(key, { target, stored, does, reason, modules: [] });
      alike.get(key).modules.push(module);
    }
  }
  const rows = [...alike.values()].sort((one, other) => one.target.localeCompare(other.target)).map(({ target, stored, does, reason, modules }) => [
    target,
    stored,
    el("details", {}, el("summary", {}, plural(modules.length, "layer")), modules.map((module) => el("div.small", {}, module))),
    does,
    reason,
  ]);
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": "What engines do with the layers" }, table([{ text: "target", fixed: true }, "stored as", { text: "layers", fixed: true }, "what it does", "why"], rows, { caption: "What engines do with the layers" }));
}
