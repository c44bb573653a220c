// Fields of forms: a label, a control, a note, and a place for what the service says of it.

import { el, fill, freshId } from "./dom.js";

/**
 * One field.
 * @param {object} what
 * @param {string} what.name of the request's field
 * @param {string} what.label
 * @param {"text"|"number"|"lines"|"choice"|"check"} what.kind
 * @param {string} what.note what it means, below
 * @param {Array} what.options of a choice: [value, text] pairs, or {group, options}
 */
export class Field {
  constructor({ name, label, kind = "text", note = "", options = [], value = null, ...attributes }) {
    this.name = name;
    this.kind = kind;
    const id = freshId(name);
    this.trouble = el("p.bad.small", { id: `${id}-trouble` });
    const shared = { id, name, "aria-describedby": `${id}-note ${id}-trouble`, ...attributes };
    this.control = controlOf(kind, shared, options);
    if (kind === "check") this.control.checked = Boolean(value);
    else if (value !== null) this.control.value = value;
    const title = el("label", { for: id }, kind === "check" ? [this.control, label] : label);
    this.element = el(
      `div.field${kind === "check" ? ".check" : ""}`,
      {},
      title,
      kind === "check" ? null : this.control,
      el("p.quiet.small", { id: `${id}-note` }, note),
      this.trouble,
    );
    this.control.addEventListener("input", () => this.complain(""));
  }

  /** What the field says, as the request wants it; undefined where nothing was said. */
  value() {
    const { control } = this;
    if (this.kind === "check") return control.checked;
    const text = control.value.trim();
    if (text === "") return undefined;
    if (this.kind === "number") return Number(text);
    if (this.kind === "lines") return text.split("\n").map((line) => line.trim()).filter(Boolean);
    return text;
  }

  /** Other options of a choice; what was chosen stays if it is among them. */
  offer(options) {
    const chosen = this.control.value;
    fill(this.control, options.map(optionOf));
    this.control.value = chosen;
    if (this.control.selectedIndex < 0) this.control.value = "";
  }

  /** Say beside the field what is wrong with it; nothing takes it back. */
  complain(words) {
    this.trouble.textContent = words;
    if (words) this.control.setAttribute("aria-invalid", "true");
    else this.control.removeAttribute("aria-invalid");
  }
}

function controlOf(kind, attributes, options) {
  if (kind === "lines") return el("textarea", { ...attributes, rows: 2, spellcheck: "false" });
  if (kind === "choice") return fill(el("select", attributes), options.map(optionOf));
  if (kind === "check") return el("input", { ...attributes, type: "checkbox" });
  if (kind === "number") return el("input", { ...attributes, type: "number", step: attributes.step ?? "any", inputmode: "decimal" });
  return el("input", { ...attributes, type: "text", autocomplete: "off", spellcheck: "false" });
}

function optionOf(option) {
  if (Array.isArray(option)) return el("option", { value: option[0] }, option[1]);
  return el("optgroup", { label: option.group }, option.options.map(optionOf));
}

/**
 * Put a problem's faults beside the fields that they are about.
 * @returns {boolean} whether every fault found its field
 */
export function showFaults(problem, fields) {
  for (const field of fields) field.complain("");
  let [all, first] = [problem.errors.length > 0, null];
  for (const { where, what } of problem.errors) {
    const names = (Array.isArray(where) ? where : String(where ?? "").split(".")).map(String);
    const field = fields.find((one) => names.includes(one.name));
    if (!field) all = false;
    else {
      field.complain(String(what));
      first ??= field;
    }
  }
  if (first) {
    first.element.closest("details")?.setAttribute("open", "");
    first.control.focus();
  }
  return all;
}

/** Names and values of the fields in which something was said. */
export function valuesOf(fields) {
  const pairs = fields.map((field) => [field.name, field.value()]);
  return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
}

/** Engines and their hardware as options of a choice, after the one for none in particular. */
export function targetOptions(targets, none) {
  const engines = [...new Set(targets.map((target) => target.engine))];
  const groups = engines.map((engine) => ({
    group: engine,
    options: targets.filter((target) => target.engine === engine).map((target) => [target.target, `${target.engine} on ${target.hardware}`]),
  }));
  return [["", none], ...groups];
}
