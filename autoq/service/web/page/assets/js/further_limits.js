// Limits and rules beside the budget, folded away until somebody wants them.

import { parameters, setParameters } from "./address.js";
import { el } from "./dom.js";
import { Field, valuesOf } from "./fields.js";

// Field of the request, its key in the address, and how it is asked for.
const LIMITS = [
  ["max_active_bits", "active", { label: "Active bits at most", kind: "number" }],
  ["max_latency_ms", "ms", { label: "Milliseconds a step at most", kind: "number" }],
  ["gpu", "gpu", { label: "On GPU", note: "such as h200" }],
  ["max_kl", "kl", { label: "Predicted KL divergence at most", kind: "number" }],
  ["rules", "rule", { label: "Rules", kind: "lines", note: "one a line: PATTERN=FORMAT[,FORMAT...]; those of the search if empty" }],
];

export class FurtherLimits {
  /** @param {() => void} onChange called when any of them is another */
  constructor(onChange) {
    const query = parameters();
    this.fields = LIMITS.map(([name, key, words]) => {
      const given = query.getAll(key).join("\n");
      const field = new Field({ name, ...words, value: given || null });
      field.control.addEventListener("change", () => this.changed(onChange));
      return field;
    });
    const isUsed = LIMITS.some(([, key]) => query.has(key));
    this.element = el("details.fold.further", { open: isUsed }, el("summary", {}, "Further limits and rules"), el("div.fields", {}, this.fields.map((field) => field.element)));
  }

  body() {
    return valuesOf(this.fields);
  }

  changed(onChange) {
    const values = this.body();
    setParameters(Object.fromEntries(LIMITS.map(([name, key]) => [key, values[name] ?? null])));
    onChange();
  }
}
