// The page of one job.

import { get } from "./api.js";
import { definitions, el, fill } from "./dom.js";
import { JobView, hasEnded, jobTitle } from "./job_view.js";
import { timeText } from "./numbers.js";
import { outcomeOf } from "./outcome.js";

/** Show a job, live. */
export async function showJob(place, { name, signal }) {
  const job = await get(`/v1/jobs/${encodeURIComponent(name)}`, { signal });
  const title = el("h1", {}, jobTitle(job));
  const outcome = el("div");
  const asked = el("details", {}, el("summary", {}, "What was asked"), request(job));
  const changed = (now) => {
    title.textContent = jobTitle(now);
    document.title = `${jobTitle(now)} (${now.status}) - autoq`;
    fill(outcome, hasEnded(now) ? outcomeOf(now) : null);
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
