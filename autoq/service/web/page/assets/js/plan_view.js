// What a plan comes to, and which layers take another format than in the plan beside it.

import { el, fill, table, tile } from "./dom.js";
import { bitsText, bytesText, gigabytesText, intervalText, lossText, percentText, plural, trimmed, unitText } from "./numbers.js";

const FIRST_MOVES = 8;

/** Bytes of all weights of the checkpoint; of the searched layers where no more is known. */
export const bytesOf = (plan) => plan.takes?.stored_bytes ?? plan.stored_bytes;

/** The plan's numbers. */
export function planTiles(plan, confidence = "95 %") {
  const [low, high] = plan.predicted_loss_interval;
  const tiles = [
    tile("effective bits per weight", bitsText(plan.effective_bits), `as ModelOpt counts ${bitsText(plan.peer_effective_bits)}`),
    tile("on disk", gigabytesText(bytesOf(plan)), `${bytesText(plan.stored_bytes)} for the searched layers`),
    tile(`predicted loss, ${unitText(plan.unit)}`, lossText(plan.predicted_loss), `${confidence}: ${intervalText(low, high)}`),
    tile("gap to the bound", percentText(plan.gap), plan.bound === null ? "nothing is proved" : `no plan is below ${lossText(plan.bound)}`),
  ];
  const { active_bits: active, latency_seconds: seconds } = plan.takes ?? {};
  if (active !== undefined && Math.abs(active - plan.effective_bits) >= 0.5e-4) tiles.push(tile("active bits", bitsText(active), "for weights that a token touches"));
  if (seconds !== undefined) tiles.push(tile("predicted time", `${trimmed(seconds * 1e3, 4)} ms`, "for the searched layers"));
  const kl = plan.measured?.kl_divergence;
  if (typeof kl === "number") tiles.push(tile("measured KL divergence", lossText(kl), "on held-out text"));
  return tiles;
}

/** Groups that take another format than in the reference, in the order of the model. */
export function moves(groups, assignment, reference, bitsOf) {
  return groups
    .map((group, index) => ({ index, name: group.name, from: reference[group.name], to: assignment[group.name] }))
    .filter(({ from, to }) => from !== undefined && to !== undefined && from !== to)
    .map((move) => ({ ...move, change: (bitsOf(move.index, move.to) ?? 0) - (bitsOf(move.index, move.from) ?? 0) }));
}

/** "7 layers move: 5 to more bits, 2 to fewer". */
export function movesSentence(moved) {
  if (!moved.length) return "No layer moves.";
  const up = moved.filter((move) => move.change >= 0).length;
  const parts = [up ? `${up} to more bits` : "", moved.length - up ? `${moved.length - up} to fewer` : ""].filter(Boolean);
  return `${plural(moved.length, "layer")} ${moved.length === 1 ? "moves" : "move"}: ${parts.join(", ")}.`;
}

/** The moves in words and as a list; `isOpen` remembers whether all of it is wanted. */
export class MoveList {
  constructor() {
    this.sentence = el("p.moves-sentence");
    this.list = el("div.scroll", { tabindex: 0, role: "region", "aria-label": "Layers that move" });
    this.more = el("button.plain", { type: "button", "aria-expanded": "false", onclick: () => this.toggle() });
    this.element = el("div.moves", {}, this.sentence, this.list, this.more);
    this.isOpen = false;
  }

  show(moved, referenceLabel) {
    this.moved = moved;
    this.referenceLabel = referenceLabel;
    this.draw();
  }

  toggle() {
    this.isOpen = !this.isOpen;
    this.draw();
  }

  draw() {
    const { moved } = this;
    fill(this.sentence, el("b", {}, movesSentence(moved)), ` Compared with ${this.referenceLabel}.`);
    const shown = this.isOpen ? moved : moved.slice(0, FIRST_MOVES);
    const rows = shown.map(({ name, from, to, change }) => [name, from, change >= 0 ? "▲ more bits" : "▼ fewer bits", to]);
    fill(this.list, moved.length ? table(["layer", "from", "", "to"], rows, { caption: "Layers that move" }) : "");
    this.list.hidden = !moved.length;
    this.more.hidden = moved.length <= FIRST_MOVES;
    this.more.setAttribute("aria-expanded", String(this.isOpen));
    this.more.textContent = this.isOpen ? "Show fewer" : `Show all ${moved.length}`;
  }
}
