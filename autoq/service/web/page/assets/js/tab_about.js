// What was asked, how long each step took, and with which versions.

import { definitions, el, table } from "./dom.js";
import { statusBadge } from "./notes.js";
import { secondsText, timeText } from "./numbers.js";

export function aboutTab({ detail }) {
  const parts = [
    part("What was asked", definitions(rowsOf(detail.configuration))),
    part("Time by stage", stages(detail.stages)),
    part("Versions", definitions(rowsOf(detail.versions))),
    part("Model", definitions([["folder", detail.model], ["architecture", detail.architecture], ["fingerprint", el("code", {}, detail.model_fingerprint)], ["created", `${timeText(detail.created)} UTC`]])),
  ];
  if (detail.rules.length) parts.push(part("Rules", el("ul", {}, detail.rules.map((rule) => el("li", {}, el("code", {}, rule))))));
  return [el("div.columns", {}, parts), leftOut(detail.excluded)];
}

function part(title, content) {
  return el("div", {}, el("h3", {}, title), content);
}

function rowsOf(values) {
  return Object.entries(values)
    .filter(([, value]) => value !== null && value !== "" && !(Array.isArray(value) && !value.length))
    .map(([name, value]) => [name.replaceAll("_", " "), typeof value === "object" ? el("code", {}, JSON.stringify(value)) : String(value)]);
}

function stages(list) {
  return table(["stage", "status", { text: "time", number: true }], list.map((stage) => [stage.name.replaceAll("_", " "), statusBadge(stage.status), secondsText(stage.seconds)]), { caption: "Stages" });
}

function leftOut(excluded) {
  if (!excluded.length) return null;
  const rows = excluded.map((one) => [one.name ?? one.slot ?? "", one.reason ?? one.why ?? JSON.stringify(one)]);
  return el("details", {}, el("summary", {}, `Left out of the search: ${excluded.length}`), el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Left out of the search" }, table(["layer", "why"], rows, { caption: "Left out of the search" })));
}
