// Several studies beside each other: their frontiers, their plans, and where those differ.

import { parameters, setParameters } from "./address.js";
import { get, queryOf, studyPath } from "./api.js";
import { Chart, comparisonFigure } from "./charts.js";
import { el, fill, link, section, table } from "./dom.js";
import { emptyNote, problemNote } from "./notes.js";
import { bitsText, gigabytesText, intervalText, lossText, plural, unitText } from "./numbers.js";
import { bytesOf } from "./plan_view.js";

const MOST_LISTED = 200;

/** The studies that the address names, beside each other. */
export async function showCompare(place, { signal }) {
  document.title = "Compare - autoq";
  const names = [...new Set(parameters().getAll("study"))];
  const results = el("div");
  fill(place, el("h1", {}, "Compare studies"), await picker(names, signal, (chosen) => {
    setParameters({ study: chosen });
    showCompare(place, { signal });
  }), results);
  if (!names.length) {
    fill(results, emptyNote("Choose two studies or more."));
    return;
  }
  await showComparison(results, names, signal);
}

async function picker(names, signal, onChange) {
  const page = await get(`/v1/studies${queryOf({ limit: 500, status: "done" })}`, { signal });
  const offered = page.items.map((entry) => entry.name).filter((name) => !names.includes(name));
  const choice = el("select", { id: "add-study" }, el("option", { value: "" }, "choose …"), offered.map((name) => el("option", { value: name }, name)));
  choice.addEventListener("change", () => choice.value && onChange([...names, choice.value]));
  const chips = names.map((name) => el("li", {}, link(`/studies/${encodeURIComponent(name)}`, name), el("button.plain", { type: "button", "aria-label": `Take ${name} away`, onclick: () => onChange(names.filter((one) => one !== name)) }, "✕")));
  return el("div.filters", {}, el("ul.chips", { "aria-label": "Studies" }, chips), el("label", { for: "add-study" }, "Add"), choice);
}

async function showComparison(place, names, signal) {
  const found = await Promise.all(names.map((name) => readStudy(name, signal)));
  const studies = found.filter((one) => one.frontier);
  const troubles = found.filter((one) => one.problem).map((one) => problemNote({ title: one.name, message: one.problem.message }));
  if (!studies.length) {
    fill(place, troubles);
    return;
  }
  const units = [...new Set(studies.map((one) => unitText(one.frontier.unit)))];
  const chart = new Chart({ label: "Frontiers of the studies. The table below names their plans.", make: (colours) => comparisonFigure(studies, units.join(", "), colours), signal, height: 420 });
  const warning = units.length > 1 ? el("p.bad", {}, `Their losses are in different units (${units.join(", ")}) and cannot be compared.`) : null;
  fill(place, troubles, warning, section("Loss against bits", chart.element), section("Plans", planTable(studies)), studies.length > 1 ? section("Where the plans differ", differences(studies)) : null);
  chart.draw();
}

async function readStudy(name, signal) {
  try {
    const [detail, frontier] = await Promise.all([get(studyPath(name), { signal }), get(studyPath(name, `/frontier${queryOf({ points: 64 })}`), { signal })]);
    return { name, detail, frontier, plan: detail.plan };
  } catch (problem) {
    if (signal.aborted || problem.status === 401) throw problem;
    return { name, problem };
  }
}

function planTable(studies) {
  const head = ["study", "model", { text: "bits", number: true }, { text: "on disk", number: true }, { text: "predicted loss", number: true }, { text: "95 %", number: true }, { text: "measured KL divergence", number: true }];
  const rows = studies.filter((one) => one.plan).map(({ name, detail, plan }) => [link(`/studies/${encodeURIComponent(name)}`, name), el("span.quiet", {}, detail.model), bitsText(plan.effective_bits), gigabytesText(bytesOf(plan)), lossText(plan.predicted_loss), intervalText(...plan.predicted_loss_interval), lossText(plan.measured?.kl_divergence)]);
  return el("div.scroll", {}, table(head, rows, { caption: "Plans", kind: ".wide" }));
}

function differences(studies) {
  const planned = studies.filter((one) => one.plan);
  const names = [...new Set(planned.flatMap((one) => Object.keys(one.plan.assignment)))];
  const rows = names.map((name) => [name, ...planned.map((one) => one.plan.assignment[name] ?? "not there")]).filter(([, ...formats]) => new Set(formats).size > 1);
  if (!rows.length) return emptyNote(`All ${names.length} layers take the same format.`);
  const listed = rows.slice(0, MOST_LISTED);
  return [
    el("p", {}, `${plural(rows.length, "layer")} of ${names.length} ${rows.length === 1 ? "takes" : "take"} different formats${rows.length > MOST_LISTED ? `; the first ${MOST_LISTED}` : ""}.`),
    el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Layers whose formats differ" }, table(["layer", ...planned.map((one) => one.name)], listed, { caption: "Layers whose formats differ" })),
  ];
}
