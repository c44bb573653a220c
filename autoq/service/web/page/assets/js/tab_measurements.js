// What was measured, and whether the prediction can be believed.

import { get, queryOf, studyPath } from "./api.js";
import { Chart, validationFigure } from "./charts.js";
import { el, fill, table } from "./dom.js";
import { emptyNote } from "./notes.js";
import { bitsText, countText, lossText, metricText, metricValueText, timeText, unitText } from "./numbers.js";

const CHARTED_TRIALS = 500;

export function measurementsTab(page) {
  const { measurements } = page.detail;
  if (!measurements.length) return emptyNote("Nothing was measured. “Measure” above measures the plan of now on held-out text.");
  const place = el("div");
  showChart(place, page);
  return [place, el("h3", {}, "Measurements"), measurementTable(page)];
}

async function showChart(place, page) {
  const { name, signal, detail } = page;
  let trials = [];
  try {
    trials = (await get(studyPath(name, `/trials${queryOf({ limit: CHARTED_TRIALS })}`), { signal })).items;
  } catch {
    // The chart shows the plans alone; the tab of trials says what went wrong with these.
  }
  const plans = plansOf(detail);
  const tried = trials
    .filter((trial) => trial.values[0] > 0 && trial.predicted_loss > 0)
    .map((trial) => ({ label: `trial ${trial.number}`, predicted: trial.predicted_loss, measured: trial.values[0] }));
  if (plans.length + tried.length === 0) return;
  const make = (colours) => validationFigure(plans, tried, unitText(detail.unit), colours);
  const chart = new Chart({ label: "Predicted loss against measured KL divergence. The table below says the same.", make, signal, height: 360 });
  fill(place, el("h3", {}, "Predicted against measured"), el("div.square", {}, chart.element));
  // After the first paint: this needs the charting library.
  setTimeout(() => chart.draw());
}

function plansOf(detail) {
  const known = new Map(detail.plans.map((plan) => [plan.id, plan]));
  return detail.measurements
    .filter((one) => one.metric === "kl_divergence" && one.value > 0 && known.get(one.plan)?.predicted_loss > 0)
    .map((one) => ({ label: one.label, predicted: known.get(one.plan).predicted_loss, measured: one.value, interval: one.interval }));
}

/** A row for each plan, a column for each metric, as in the report. */
function measurementTable({ detail }) {
  const plans = new Map(detail.plans.map((plan) => [plan.id, plan]));
  const metrics = [...new Set(detail.measurements.map((one) => one.metric))];
  const rows = new Map();
  for (const one of detail.measurements) {
    const key = `${one.plan} ${one.label}`;
    if (!rows.has(key)) rows.set(key, { label: one.label, plan: plans.get(one.plan), tokens: one.tokens, created: one.created, values: new Map() });
    rows.get(key).values.set(one.metric, one);
  }
  const number = (text) => ({ text, number: true });
  const head = ["plan", number("bits"), number("predicted"), ...metrics.map((name) => number(metricText(name))), number("tokens"), { text: "when (UTC)", fixed: true }];
  const cells = [...rows.values()].map(({ label, plan, tokens, created, values }) => [
    label,
    bitsText(plan?.effective_bits),
    lossText(plan?.predicted_loss),
    ...metrics.map((name) => metricCell(values.get(name))),
    tokens === null ? "" : countText(tokens),
    timeText(created),
  ]);
  return el("div.scroll", {}, table(head, cells, { caption: "Measurements, with the ends of their 95 % intervals", kind: ".wide" }));
}

function metricCell(one) {
  if (!one) return "";
  const value = metricValueText(one.metric, one.value);
  if (!one.interval) return value;
  const ends = one.interval.map((end) => metricValueText(one.metric, end)).join(" to ");
  return [value, el("div.quiet.small", {}, ends)];
}
