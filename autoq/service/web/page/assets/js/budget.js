// The budget: a slider, the same as a number, and the unit of both.

import { parameters, setParameters } from "./address.js";
import { el, fill } from "./dom.js";
import { trimmed } from "./numbers.js";

const MOST_STEPS = 1200;

/** Values that a slider stops at: both ends as they are, and round ones between them. */
export function stops(floor, ceiling) {
  const rough = (ceiling - floor) / MOST_STEPS;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((size) => size * magnitude).find((size) => size >= rough * (1 - 1e-9));
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const found = [floor];
  for (let index = Math.ceil(floor / step + 1e-6); index * step < ceiling - step * 1e-6; index += 1) found.push(Number((index * step).toFixed(digits)));
  return ceiling > floor ? [...found, ceiling] : found;
}

const UNITS = {
  bits: { field: "effective_bits", words: "effective bits", name: "effective bits per weight", text: (value) => `${trimmed(value, 5)} bits` },
  gb: { field: "max_gb", words: "GB on disk", name: "gigabytes on disk", text: (value) => `${trimmed(value, 5)} GB` },
};

export class BudgetControl {
  /**
   * @param {{bits: [number, number], gb: [number, number]|null}} ranges least and most of each unit
   * @param {{bits: number, gb: number|null}} start where the control stands if the address says nothing
   * @param {(body: object, isSettled: boolean) => void} onChange
   */
  constructor(ranges, start, onChange) {
    this.ranges = ranges;
    this.values = { ...start };
    this.onChange = onChange;
    const query = parameters();
    this.unit = query.has("gb") && ranges.gb ? "gb" : "bits";
    this.isAsked = query.has("gb") || query.has("bits");
    const asked = Number(query.get(this.unit));
    if (this.isAsked && asked > 0) this.values[this.unit] = asked;
    this.compose();
    this.setUp();
  }

  compose() {
    this.slider = el("input.slider", {
      type: "range", id: "budget", min: 0, step: 1,
      oninput: () => this.slide(false), onchange: () => this.slide(true), onkeydown: (event) => this.page(event),
    });
    this.number = el("input", { type: "number", id: "budget-number", step: "any", "aria-label": "Budget as a number", onchange: () => this.take(Number(this.number.value), true) });
    const units = Object.keys(UNITS).filter((unit) => this.ranges[unit]);
    this.units = el("select", { id: "budget-unit", "aria-label": "Unit of the budget", onchange: () => this.changeUnit() }, units.map((unit) => el("option", { value: unit }, UNITS[unit].words)));
    this.ends = el("div.ends.quiet.small", { "aria-hidden": "true" });
    this.element = el("div.budget", {}, el("label", { for: "budget" }, "Budget"), el("div.slider-box", {}, this.slider, this.ends), el("div.budget-number", {}, this.number, this.units));
  }

  /** Other ends, once they are known better. */
  setRanges(ranges) {
    this.ranges = ranges;
    this.setUp();
  }

  setUp() {
    const { unit } = this;
    this.units.value = unit;
    this.stops = stops(...this.ranges[unit]);
    this.slider.max = String(this.stops.length - 1);
    fill(this.ends, el("span", {}, UNITS[unit].text(this.ranges[unit][0])), el("span", {}, UNITS[unit].text(this.ranges[unit][1])));
    this.reflect();
  }

  /** Slider and number as the value has it. */
  reflect() {
    const value = this.values[this.unit];
    this.slider.value = String(nearest(this.stops, value));
    this.slider.setAttribute("aria-valuetext", UNITS[this.unit].text(value));
    if (document.activeElement !== this.number) this.number.value = trimmed(value, 7);
  }

  slide(isSettled) {
    this.take(this.stops[Number(this.slider.value)], isSettled);
  }

  /** A tenth of the range; browsers differ in what they take PageUp to be. */
  page(event) {
    const direction = { PageUp: 1, PageDown: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const place = Number(this.slider.value) + direction * Math.round(this.stops.length / 10);
    this.take(this.stops[Math.min(Math.max(place, 0), this.stops.length - 1)], true);
  }

  take(value, isSettled) {
    if (!(value > 0)) {
      this.number.value = trimmed(this.values[this.unit], 7); // nothing, or no budget
      return;
    }
    this.isAsked = true;
    this.values[this.unit] = value;
    this.reflect();
    this.onChange(this.body(), isSettled);
    if (isSettled) this.store();
  }

  /** Stand where a plan is that was chosen elsewhere: on a chart, in a list. */
  set(bits) {
    this.unit = "bits";
    this.values.bits = bits;
    this.setUp();
    this.take(bits, true);
  }

  changeUnit() {
    this.unit = this.units.value;
    this.setUp();
    this.take(this.values[this.unit], true);
  }

  /** What the plan of now comes to in the unit that is not set, so that changing units stays there. */
  learn({ bits, gb }) {
    if (this.unit === "bits") this.values.gb = gb;
    else this.values.bits = bits;
    if (!this.isAsked) {
      this.values = { bits, gb };
      this.reflect();
    }
  }

  body() {
    return this.isAsked ? { [UNITS[this.unit].field]: this.values[this.unit] } : {};
  }

  store() {
    setParameters({ bits: null, gb: null, [this.unit]: trimmed(this.values[this.unit], 12) });
  }
}

function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}
