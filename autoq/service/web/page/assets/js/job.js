// The page of one job.

import { get } from "./api.js";
import { definitions, el, fill, link } from "./dom.js";
import { JobView, hasEnded, jobTitle } from "./job_view.js";
import { bitsText, bytesText, lossText, metricText, metricValueText, timeText, unitText } from "./numbers.js";

/** Show a job, live. */
export async function showJob(place, { name, signal }) {
  const job = await get(`/v1/jobs/${encodeURIComponent(name)}`, { signal });
  const title = el("h1", {}, jobTitle(job));
  const outcome = el("div");
  const asked = el("details", {}, el("summary", {}, "What was asked"), request(job));
  const changed = (now) => {
    title.textContent = jobTitle(now);
    document.title = `${jobTitle(now)} (${now.status}) - autoq`;
    fill(outcome, outcomeOf(now));
  };
  const view = new JobView({ signal, onChange: changed });
  fill(place, title, el("p.quiet", {}, `Asked for ${timeText(job.created)} UTC`), view.element, asked);
  view.start(job);
  view.head.after(outcome);
  changed(job);
}

function request(job) {
  const given = Object.entries(job.request).filter(([, value]) => value !== null && !(Array.isArray(value) && value.length === 0));
  const rows = given.map(([name, value]) => [name.replaceAll("_", " "), typeof value === "string" ? value : JSON.stringify(value)]);
  return definitions(job.worker ? [...rows, ["worker", job.worker]] : rows);
}

function outcomeOf(job) {
  const found = Object.entries(job.result ?? {}).filter(([, value]) => value !== null && value !== "");
  const rows = found.flatMap(([name, value]) => (name === "measured" ? Object.entries(value).map(([metric, number]) => [metricText(metric), metricValueText(metric, number)]) : [[name.replaceAll("_", " "), valueOf(name, value)]]));
  return hasEnded(job) && rows.length ? definitions(rows) : null;
}

function valueOf(name, value) {
  if (typeof value === "object") return el("code", {}, JSON.stringify(value));
  if (name === "unit") return unitText(value);
  if (name === "study") return link(`/studies/${encodeURIComponent(value)}`, value);
  if (typeof value !== "number") return String(value);
  if (name.endsWith("bytes")) return bytesText(value);
  if (name.endsWith("bits")) return bitsText(value);
  return Number.isInteger(value) ? String(value) : lossText(value);
}
