// Checkpoints: what was written, whether it was read back right, and the form for another.

import { navigate } from "./address.js";
import { JobKey, get, studyPath } from "./api.js";
import { el, fill, table } from "./dom.js";
import { Field, showFaults, targetOptions, valuesOf } from "./fields.js";
import { emptyNote, problemNote, statusBadge } from "./notes.js";
import { bytesText, lossText, plural, timeText } from "./numbers.js";

export function exportsTab(page) {
  const { exports } = page.detail;
  const list = exports.length ? exports.map((entry) => exportEntry(entry, page)) : emptyNote("Nothing was exported yet.");
  if (!page.budget) return [list];
  page.forms.exports ??= exportForm(page);
  offerContainers(page.forms.container, page);
  return [list, page.forms.exports];
}

function exportEntry(entry, page) {
  const files = table(["file", { text: "bytes", number: true }, "SHA-256"], entry.files.map((file) => [file.path, bytesText(file.bytes), el("code", {}, file.sha256)]), { caption: `Files of ${entry.path}` });
  return el(
    "article.export",
    { "aria-label": entry.path },
    el("p.facts", {}, statusBadge(entry.status), el("b", {}, entry.path), el("span", {}, entry.container), el("span", {}, bytesText(entry.bytes)), el("span", {}, `plan ${entry.plan}`), el("span", {}, `${timeText(entry.finished ?? entry.started)} UTC`)),
    verification(entry.verification),
    el("details", {}, el("summary", {}, plural(entry.files.length, "file")), el("div.scroll", {}, files)),
    entry.status === "complete" ? checkForm(entry, page) : null,
  );
}

/** Ask what engines make of a checkpoint; the job's page says it. */
function checkForm(entry, page) {
  const target = new Field({ name: "target", label: "Where it will run", kind: "choice", options: [["", "anywhere"]], note: "What the engine does with every layer, without a GPU." });
  const trouble = el("div");
  const send = el("button", { type: "submit" }, "Check this checkpoint");
  page.needs("run", send);
  const key = new JobKey();
  const submit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    try {
      const job = await key.post("/v1/verifications", { checkpoint: entry.path, ...valuesOf([target]) });
      navigate(`/jobs/${encodeURIComponent(job.id)}`);
    } catch (problem) {
      if (!showFaults(problem, [target])) fill(trouble, problemNote(problem));
    } finally {
      send.disabled = false;
    }
  };
  const open = async (event) => {
    if (!event.target.open) return;
    try {
      target.offer(targetOptions(await get("/v1/targets", { signal: page.signal }), "anywhere"));
    } catch {
      // Without the list it is checked for all of them.
    }
  };
  return el("details", { ontoggle: open }, el("summary", {}, "Check where it runs"), el("form", { novalidate: true, onsubmit: submit }, el("div.fields", {}, target.element), trouble, el("p.actions", {}, send)));
}

/** What reading back found, as names and values; nested values stay as they are written. */
function verification(found) {
  const pairs = Object.entries(found ?? {}).filter(([, value]) => value !== null && !(Array.isArray(value) && !value.length));
  if (!pairs.length) return emptyNote("Not read back.");
  const words = ([name, value]) => `${name.replaceAll("_", " ")}: ${foundText(name, value)}`;
  return el("p.small", {}, "Read back: ", el("span.quiet", {}, pairs.map(words).join("; ")));
}

function foundText(name, value) {
  if (typeof value === "object") return Object.entries(value).map(([part, one]) => `${part.replaceAll("_", " ")} ${foundText(part, one)}`).join(", ");
  if (typeof value !== "number") return String(value);
  if (name.endsWith("bytes")) return bytesText(value);
  return Number.isInteger(value) ? String(value) : lossText(value);
}

function exportForm(page) {
  const fields = [
    new Field({ name: "output", label: "Output", placeholder: "exports/name", note: "ROOT/folder below the service's folder for exports", required: true }),
    new Field({ name: "container", label: "Container", kind: "choice", options: [["", "what suits the study's target"]] }),
    new Field({ name: "tp_size", label: "Tensor-parallel ranks", kind: "number", placeholder: "1", step: 1, min: 1 }),
    new Field({ name: "pp_size", label: "Pipeline ranks", kind: "number", placeholder: "1", step: 1, min: 1 }),
    new Field({ name: "overwrite", label: "Overwrite what is there", kind: "check" }),
  ];
  page.forms.container = fields[1];
  const trouble = el("div");
  const send = el("button.strong", { type: "submit" }, "Export this plan");
  page.needs("run", send);
  const key = new JobKey();
  const submit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    fill(trouble);
    try {
      const plan = await page.stored();
      const job = await key.post(studyPath(page.name, "/exports"), { ...valuesOf(fields), plan: plan.id });
      await page.followJob(job);
      scrollTo({ top: 0 });
    } catch (problem) {
      if (!showFaults(problem, fields)) fill(trouble, problemNote(problem));
    } finally {
      send.disabled = false;
    }
  };
  return el("form.panel", { id: "export-form", novalidate: true, onsubmit: submit }, el("h3", {}, "Export the plan of now"), el("p.quiet", {}, "Writes a checkpoint for the budget above, reads it back, and compares it bit for bit with what was searched."), el("div.fields", {}, fields.map((field) => field.element)), trouble, el("p.actions", {}, send));
}

/** Containers that hold every format of the plan of now. */
async function offerContainers(field, page) {
  try {
    const formats = await get("/v1/formats", { signal: page.signal });
    const taken = new Set(Object.values(page.plan.assignment));
    const needed = formats.filter((format) => taken.has(format.name) && format.name !== "none");
    const all = [...new Set(formats.flatMap((format) => format.containers))];
    const fitting = all.filter((container) => needed.every((format) => format.containers.includes(container)));
    const chosen = field.control.value;
    fill(field.control, field.control.options[0], fitting.map((container) => el("option", { value: container }, container)));
    field.control.value = fitting.includes(chosen) ? chosen : "";
  } catch {
    // Without the list the service chooses; it says what does not fit.
  }
}
