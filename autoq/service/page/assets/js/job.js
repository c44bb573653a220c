// The page of one job.

import { get } from "./api.js";
import { definitions, el, fill, link } from "./dom.js";
import { JobView, hasEnded, jobTitle } from "./job_view.js";
import { timeText } from "./numbers.js";

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
  fill(place, title, el("p.quiet", {}, `Asked for ${timeText(job.created)} UTC`, job.worker ? `, by ${job.worker}` : ""), view.element, asked);
  view.start(job);
  view.head.after(outcome);
  changed(job);
}

function request(job) {
  const given = Object.entries(job.request).filter(([, value]) => value !== null && !(Array.isArray(value) && value.length === 0));
  return definitions(given.map(([name, value]) => [name.replaceAll("_", " "), typeof value === "string" ? value : JSON.stringify(value)]));
}

function outcomeOf(job) {
  if (!hasEnded(job)) return null;
  const way = job.study ? el("p", {}, link(`/studies/${encodeURIComponent(job.study)}`, "Look at the study")) : null;
  const result = Object.entries(job.result ?? {});
  const words = result.map(([name, value]) => [name.replaceAll("_", " "), typeof value === "object" ? el("code", {}, JSON.stringify(value)) : value]);
  return [way, result.length ? definitions(words) : null];
}
