// What a study rests on and what came of it, a tab each.

import { parameters, setParameters } from "./address.js";
import { el, fill, section } from "./dom.js";
import { aboutTab } from "./tab_about.js";
import { exportsTab } from "./tab_exports.js";
import { measurementsTab } from "./tab_measurements.js";
import { plansTab } from "./tab_plans.js";
import { trialsTab } from "./tab_trials.js";

const TABS = [
  ["measurements", "Measurements", measurementsTab],
  ["trials", "Trials", trialsTab],
  ["plans", "Stored plans", plansTab],
  ["exports", "Exports", exportsTab],
  ["about", "About this study", aboutTab],
];

export class StudyTabs {
  constructor(page) {
    this.page = page;
    const asked = parameters().get("tab");
    this.chosen = TABS.some(([name]) => name === asked) ? asked : TABS[0][0];
    this.buttons = new Map(TABS.map(([name, title]) => [name, el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "tab-panel", onclick: () => this.choose(name) }, title)]));
    this.list = el("div.tabs", { role: "tablist", "aria-label": "More about this study", onkeydown: (event) => this.press(event) }, [...this.buttons.values()]);
    this.panel = el("div.tab-panel", { role: "tabpanel", id: "tab-panel", tabindex: -1 });
    this.element = section("Results", this.list, this.panel);
    // What is in the panel may need the page's width: it is filled once it stands in it.
    queueMicrotask(() => this.show());
  }

  choose(name) {
    this.chosen = name;
    setParameters({ tab: name });
    this.show();
  }

  /** Choose a tab from elsewhere on the page, and go to one of its controls. */
  open(name, selector) {
    this.choose(name);
    const control = this.panel.querySelector(selector);
    control?.scrollIntoView({ block: "center" });
    control?.focus();
  }

  press(event) {
    const names = [...this.buttons.keys()];
    const place = names.indexOf(this.chosen);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(names[(to + names.length) % names.length]);
    this.buttons.get(this.chosen).focus();
  }

  /** Fill the panel again: something was measured, kept or exported. */
  renew() {
    this.show();
  }

  show() {
    for (const [name, button] of this.buttons) {
      button.setAttribute("aria-selected", String(name === this.chosen));
      button.tabIndex = name === this.chosen ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${this.chosen}`);
    const [, , make] = TABS.find(([name]) => name === this.chosen);
    const held = this.panel.contains(document.activeElement) ? document.activeElement : null;
    fill(this.panel, make(this.page));
    if (held?.isConnected) held.focus({ preventScroll: true }); // in a form, which is not made anew
  }
}
