// The form that starts a search.

import { navigate } from "./address.js";
import { JobKey, get } from "./api.js";
import { formatColours } from "./colours.js";
import { el, fill, link, swatch } from "./dom.js";
import { Field, showFaults, targetOptions, valuesOf } from "./fields.js";
import { emptyNote, problemNote } from "./notes.js";
import { bytesText, trimmed } from "./numbers.js";

const LIMITS = [
  { name: "effective_bits", label: "Effective bits per weight", kind: "number", note: "mean over the searched weights, block scales included", placeholder: "4.8" },
  { name: "max_gb", label: "Gigabytes on disk", kind: "number", note: "10⁹ bytes, for all weights of the checkpoint" },
];
const FURTHER_LIMITS = [
  { name: "max_active_bits", label: "Active bits", kind: "number", note: "per weight that a token touches" },
  { name: "max_latency_ms", label: "Milliseconds a step", kind: "number", note: "predicted; names a GPU, too" },
  { name: "gpu", label: "GPU", note: "such as h200" },
  { name: "max_kl", label: "KL divergence", kind: "number", note: "the smallest model that keeps it; measured" },
];
const LAYERS = [
  { name: "rules", label: "Rules", kind: "lines", note: "one a line: PATTERN=FORMAT[,FORMAT...]" },
  { name: "include", label: "Search these layers, too", kind: "lines", note: "one pattern a line" },
  { name: "exclude", label: "Leave these layers alone", kind: "lines", note: "one pattern a line" },
];
const DATA = [
  { name: "calibration_data", label: "Calibration data", note: "ROOT/file below a data folder of the service; the bundled text if empty" },
  { name: "calibration_sequences", label: "Calibration sequences", kind: "number", placeholder: "128", step: 1 },
  { name: "sequence_length", label: "Tokens in a sequence", kind: "number", placeholder: "512", step: 1 },
  { name: "held_out_sequences", label: "Held-out sequences", kind: "number", placeholder: "32", step: 1, note: "what plans are measured on" },
  { name: "batch_size", label: "Batch size", kind: "number", placeholder: "4", step: 1 },
  { name: "seed", label: "Seed", kind: "number", placeholder: "0", step: 1 },
];
const MACHINE = [
  { name: "device", label: "Device", note: "auto, cpu, cuda or cuda:1", placeholder: "auto" },
  { name: "dtype", label: "Computed in", kind: "choice", options: ["auto", "float32", "bfloat16", "float16"].map((name) => [name, name]) },
  { name: "max_memory", label: "Memory limit", note: "such as 8GiB: the model is read a block at a time" },
];
const METHOD = [
  { name: "calibration", label: "Calibration", placeholder: "best" },
  { name: "estimator", label: "Estimator", note: "of sensitivities; the usual one if empty" },
  { name: "confidence", label: "Confidence", kind: "number", note: "plan for this quantile of the loss, 0 to 1, not for its mean" },
  { name: "kv_bits", label: "Bits of the key/value cache", kind: "number" },
  { name: "kv_formats", label: "Formats of the key/value cache", kind: "lines", note: "one a line" },
];
const AFTER = [
  { name: "measure", label: "Measure the plan on held-out text", kind: "check", value: true },
  { name: "compare_uniform", label: "Measure one format throughout, too", kind: "check" },
  { name: "refine", label: "Refine by so many trials", kind: "number", placeholder: "0", step: 1 },
  { name: "export", label: "Export to", note: "ROOT/folder below the service's folder for exports" },
  { name: "container", label: "Container", note: "modelopt, compressed-tensors, …; what suits the target if empty" },
  { name: "overwrite", label: "Overwrite a checkpoint that is there", kind: "check" },
];

/** Show the form; a search that the service takes leads to its job. */
export async function showSearchForm(place, { signal }) {
  document.title = "New search - autoq";
  const [models, formats, targets] = await Promise.all(["models", "formats", "targets"].map((name) => get(`/v1/${name}`, { signal })));
  fill(place, el("p.way", {}, link("/", "Studies")), el("h1", {}, "New search"), new SearchForm(models, formats, targets).element);
}

class SearchForm {
  constructor(models, formats, targets) {
    this.formats = formats;
    this.targets = targets;
    this.key = new JobKey();
    this.model = new Field({ name: "model", label: "Model", kind: "choice", options: models.map(modelOption), note: models.length ? "" : "The service was given no folder of models: autoq serve --models ROOT.", required: true });
    this.target = new Field({ name: "target", label: "Where it will run", kind: "choice", options: targetOptions(targets, "anywhere"), note: "Formats that do not run there are not offered." });
    this.studyName = new Field({ name: "name", label: "Name of the study", note: "letters, digits, . _ -; made from the model if empty" });
    this.target.control.addEventListener("change", () => this.markFormats());
    const fieldsOf = (specifications) => specifications.map((one) => new Field(one));
    this.parts = { limits: fieldsOf(LIMITS), further: fieldsOf(FURTHER_LIMITS), layers: fieldsOf(LAYERS), data: fieldsOf(DATA), machine: fieldsOf(MACHINE), method: fieldsOf(METHOD), after: fieldsOf(AFTER) };
    this.fields = [this.model, this.target, this.studyName, ...Object.values(this.parts).flat()];
    this.trouble = el("div");
    this.send = el("button.strong", { type: "submit" }, "Start the search");
    this.element = this.compose();
    this.markFormats();
  }

  compose() {
    const { parts } = this;
    const grid = (fields) => el("div.fields", {}, fields.map((field) => field.element));
    const folded = (title, fields) => el("details.fold", {}, el("summary", {}, title), grid(fields));
    return el(
      "form.search-form",
      { novalidate: true, onsubmit: (event) => this.submit(event) },
      el("fieldset", {}, el("legend", {}, "What"), grid([this.model, this.studyName])),
      el("fieldset", {}, el("legend", {}, "Budget"), emptyNote("At least one; all that are given hold together."), grid(parts.limits), folded("Further limits", parts.further)),
      el("fieldset", {}, el("legend", {}, "Formats"), grid([this.target]), this.formatChoice()),
      folded("Layers", parts.layers),
      folded("Calibration data", parts.data),
      folded("Memory and device", parts.machine),
      folded("Method", parts.method),
      folded("Afterwards: measure, refine, export", parts.after),
      this.trouble,
      el("p.actions", {}, this.send),
    );
  }

  formatChoice() {
    const colours = formatColours(this.formats.map((format) => format.name));
    this.boxes = new Map();
    const entries = this.formats.filter((format) => format.name !== "none").map((format) => {
      const box = el("input", { type: "checkbox", name: "formats", value: format.name, checked: format.offered_unasked });
      this.boxes.set(format.name, box);
      const words = format.summary || format.weight;
      return el("li", {}, el("label", {}, box, swatch(colours.get(format.name)), el("b", {}, format.name), el("span.bits", {}, `${trimmed(format.effective_bits, 4)} bits`), el("span.quiet.small", {}, words)));
    });
    return el("ul.formats", { "aria-label": "Formats to choose from" }, entries);
  }

  /** What does not run on the chosen target cannot be ticked. */
  markFormats() {
    const target = this.targets.find((one) => one.target === this.target.value());
    for (const [name, box] of this.boxes) {
      box.disabled = target !== undefined && !target.formats.includes(name);
      box.closest("li").classList.toggle("unavailable", box.disabled);
    }
  }

  /** Null where the boxes are as they were found, so that the service offers what it offers unasked. */
  chosenFormats() {
    const isUsual = this.formats.every((format) => !this.boxes.has(format.name) || this.boxes.get(format.name).checked === format.offered_unasked);
    if (isUsual) return {};
    return { formats: [...this.boxes].filter(([, box]) => box.checked && !box.disabled).map(([name]) => name) };
  }

  body() {
    const values = valuesOf(this.fields);
    if (values.dtype === "auto") delete values.dtype;
    return { ...values, ...this.chosenFormats() };
  }

  async submit(event) {
    event.preventDefault();
    this.send.disabled = true;
    fill(this.trouble);
    try {
      const job = await this.key.post("/v1/studies", this.body());
      navigate(`/jobs/${encodeURIComponent(job.id)}`);
    } catch (problem) {
      if (!showFaults(problem, this.fields)) fill(this.trouble, problemNote(problem));
    } finally {
      this.send.disabled = false;
    }
  }
}

function modelOption(model) {
  return [model.path, `${model.path} (${[model.architecture, bytesText(model.bytes)].filter(Boolean).join(", ")})`];
}
