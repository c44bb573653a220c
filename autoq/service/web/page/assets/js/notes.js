// What the page says in words when something goes wrong or is not there.

import { el } from "./dom.js";

/** A refusal or failure, in the service's own sentence. */
export function problemNote(problem) {
  return el("div.note.bad-note", { role: "alert" }, el("b", {}, problem.title || "That did not work"), el("p", {}, problem.message));
}

/** Something that is not there, and what to do about it. */
export function emptyNote(...words) {
  return el("p.quiet", {}, ...words);
}

/** What a status is called, with a shape beside its colour. */
export function statusBadge(status) {
  const shapes = { done: "●", complete: "●", running: "◐", queued: "○", todo: "○", cancelling: "◐", failed: "✕", cancelled: "–", interrupted: "‖" };
  return el(`span.badge.is-${status}`, {}, el("span", { "aria-hidden": "true" }, shapes[status] ?? "·"), ` ${status}`);
}
