// The plan that the plan of now is compared with.

import { parameters, setParameters } from "./address.js";
import { get, post, studyPath } from "./api.js";
import { el, fill } from "./dom.js";
import { problemNote } from "./notes.js";
import { bitsText, trimmed } from "./numbers.js";

/** A choice among the study's plan, the one before the last step, stored plans, and pinned ones. */
export class Reference {
  /**
   * @param {object} page with `name`, `detail`, `plan`, `signal`
   * @param {() => void} onChange called when another plan is compared with
   */
  constructor(page, onChange) {
    this.page = page;
    this.onChange = onChange;
    this.before = page.plan;
    this.pinned = null;
    this.other = null;
    this.choice = el("select", { id: "reference", onchange: () => this.choose(this.choice.value) });
    this.trouble = el("div");
    const pin = el("button", { type: "button", onclick: () => this.pin() }, "Pin this plan");
    this.element = el("div.reference", {}, el("label", { for: "reference" }, "Compare with"), this.choice, pin, this.trouble);
    this.renew();
    const asked = parameters().get("against");
    if (asked) this.choose(asked);
  }

  /** The plan before a step, to compare with while the slider moves. */
  remember(plan) {
    this.before = plan;
  }

  /** The choices, with the plans that are stored by now. */
  renew() {
    const { detail } = this.page;
    const options = [["", "the study's plan"], ["previous", "the plan before this step"]];
    if (this.pinned) options.push([this.pinned.key, `the pinned plan, ${bitsText(this.pinned.plan.effective_bits)} bits`]);
    for (const plan of detail.plans) options.push([`plan-${plan.id}`, `plan ${plan.id}: ${plan.label}, ${bitsText(plan.effective_bits)} bits`]);
    const chosen = this.chosen ?? "";
    fill(this.choice, options.map(([value, text]) => el("option", { value }, text)));
    this.choice.value = chosen;
  }

  /** Whose formats are compared with, and what it is called. */
  current() {
    const { detail, plan } = this.page;
    if (this.chosen === "previous") return { label: "the plan before this step", assignment: this.before.assignment };
    if (this.chosen && this.other) return { label: this.other.label, assignment: this.other.plan.assignment };
    return { label: "the study's plan", assignment: (detail.plan ?? plan).assignment };
  }

  pin() {
    const { plan } = this.page;
    const key = `bits-${trimmed(plan.budgets.effective_bits ?? plan.effective_bits, 12)}`;
    this.pinned = { key, plan };
    this.chosen = key;
    this.other = { label: `the pinned plan, ${bitsText(plan.effective_bits)} bits`, plan };
    setParameters({ against: key });
    this.renew();
    this.onChange();
  }

  async choose(key) {
    try {
      this.other = await this.planOf(key);
      fill(this.trouble);
    } catch (error) {
      if (!this.page.signal.aborted) fill(this.trouble, problemNote(error));
      return;
    }
    this.chosen = key;
    setParameters({ against: key });
    this.renew();
    this.onChange();
  }

  /** The plan that a key of the address names. */
  async planOf(key) {
    const { name, signal } = this.page;
    const [, kind, value] = /^(plan|bits)-(.+)$/.exec(key) ?? [];
    if (kind === "plan") {
      const plan = await get(studyPath(name, `/plans/${encodeURIComponent(value)}`), { signal });
      return { label: `plan ${plan.id} (${plan.label})`, plan };
    }
    if (kind !== "bits") return null;
    if (this.pinned?.key !== key) this.pinned = { key, plan: await post(studyPath(name, "/plans"), { effective_bits: Number(value) }, { signal }) };
    return { label: `the pinned plan, ${bitsText(this.pinned.plan.effective_bits)} bits`, plan: this.pinned.plan };
  }
}
