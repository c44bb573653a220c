// Trials of refinements: measured plans near the best one.

import { JobKey, get, queryOf, studyPath } from "./api.js";
import { Chart, trialsFigure } from "./charts.js";
import { el, fill, table } from "./dom.js";
import { Field, showFaults, valuesOf } from "./fields.js";
import { emptyNote, problemNote } from "./notes.js";
import { bitsText, lossText, plural, timeText } from "./numbers.js";

const PAGE = 100;

export function trialsTab(page) {
  const place = el("div", {}, el("p.quiet", {}, "Reading trials …"));
  loadTrials(place, page, [], null);
  return [place, (page.forms.trials ??= refineForm(page))];
}

async function loadTrials(place, page, known, cursor) {
  let reply;
  try {
    reply = await get(studyPath(page.name, `/trials${queryOf({ limit: PAGE, cursor })}`), { signal: page.signal });
  } catch (error) {
    if (!page.signal.aborted) fill(place, problemNote(error));
    return;
  }
  const trials = [...known, ...reply.items];
  const elsewhere = dashboardNote(await page.identity());
  if (page.signal.aborted) return;
  if (!trials.length) {
    fill(place, emptyNote("No trials yet. A refinement measures plans near the best one, and learns what scores got wrong."), elsewhere);
    return;
  }
  const chart = new Chart({ label: "What each trial measured. The table below says the same.", make: (colours) => trialsFigure(trials, colours), signal: page.signal, height: 280 });
  const more = el("button", { type: "button", onclick: () => loadTrials(place, page, trials, reply.next_cursor) }, `Show more (${trials.length} of ${reply.total})`);
  fill(
    place,
    el("p", {}, plural(reply.total, "trial"), "."),
    elsewhere,
    chart.element,
    trialTable(trials),
    reply.next_cursor ? more : "",
  );
  chart.draw();
}

/** Where Optuna's dashboard is, or how it is started. */
function dashboardNote(identity) {
  const address = identity?.dashboard;
  if (address && /^https?:\/\//.test(address)) return el("p", {}, el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, "Optuna's dashboard"), " has each trial in detail (another page, in a new tab).");
  return el("p.quiet", {}, el("code", {}, "autoq dashboard --store URL"), ", with the store that this service was started with, opens Optuna's dashboard with each trial in detail.");
}

function trialTable(trials) {
  const head = [{ text: "trial", number: true }, "state", { text: "measured", number: true }, { text: "bits", number: true }, { text: "predicted", number: true }, { text: "finished (UTC)", fixed: true }, "refinement"];
  const rows = trials.map((trial) => [trial.number, trial.state, trial.values.map(lossText).join(", "), bitsText(trial.effective_bits), lossText(trial.predicted_loss), timeText(trial.finished), el("span.quiet", {}, trial.refinement)]);
  return el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Trials" }, table(head, rows, { caption: "Trials", kind: ".wide" }));
}

function refineForm(page) {
  const fields = [
    new Field({ name: "trials", label: "Trials", kind: "number", value: "30", step: 1, min: 1 }),
    new Field({ name: "objective", label: "What to minimise", placeholder: "kl", note: "a sum such as kl + 0.1*ppl; KL divergence if empty" }),
  ];
  fields[0].control.id = "refine-trials";
  fields[0].element.querySelector("label").htmlFor = "refine-trials";
  const trouble = el("div");
  const send = el("button.strong", { type: "submit" }, "Refine");
  page.needs("run", send);
  const key = new JobKey();
  const submit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    try {
      const job = await key.post(studyPath(page.name, "/refinements"), { ...valuesOf(fields), ...(page.budget?.body() ?? {}), ...page.limits.body() });
      fill(trouble);
      await page.followJob(job);
      scrollTo({ top: 0 });
    } catch (problem) {
      if (!showFaults(problem, fields)) fill(trouble, problemNote(problem));
    } finally {
      send.disabled = false;
    }
  };
  return el("form.panel", { novalidate: true, onsubmit: submit }, el("h3", {}, "Refine by measuring"), el("p.quiet", {}, "Measures near-optimal plans around the one for the budget above; only what is significantly better takes its place."), el("div.fields", {}, fields.map((field) => field.element)), trouble, el("p.actions", {}, send));
}
