// A picture of many cells that says what is under the pointer or the keyboard's cursor.
//
// A thousand groups in a dozen formats are twelve thousand cells: as elements they would take
// seconds, on a canvas they take milliseconds. The words for each are made when they are asked for.

import { el } from "./dom.js";

const KEYS = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -Infinity], End: [0, Infinity],
};

export class GridCanvas {
  /**
   * @param {object} options
   * @param {string} options.label what the picture is, for screen readers
   * @param {(row: number, column: number) => string|null} options.describe words of a cell; null where none is
   * @param {(context: CanvasRenderingContext2D) => void} options.paint draws everything, in CSS pixels
   */
  constructor({ label, describe, paint }) {
    this.describe = describe;
    this.paint = paint;
    this.cursor = null;
    this.followScroll = () => {};
    this.canvas = el("canvas", { tabindex: 0, role: "application", "aria-roledescription": "grid of cells", "aria-label": `${label}. Arrow keys move from cell to cell.` });
    this.tip = el("div.tip", { "aria-hidden": "true" });
    this.tip.hidden = true;
    this.said = el("div.visually-hidden", { "aria-live": "polite" });
    this.element = el("div.grid-canvas", {}, this.canvas, this.tip, this.said);
    this.listen();
  }

  /**
   * Where cells are, in CSS pixels.
   * @param {{width: number, height: number, top: number, rowHeight: number, rows: number, columns: Array<{left: number, width: number}>}} place
   */
  place(place) {
    this.at = place;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(place.width * scale);
    this.canvas.height = Math.round(place.height * scale);
    this.canvas.style.width = `${place.width}px`;
    this.canvas.style.height = `${place.height}px`;
    this.draw();
  }

  /** Paint it, and the cursor over it. */
  draw() {
    const context = this.canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.at.width, this.at.height);
    this.paint(context);
    if (this.cursor) this.drawCursor(context);
  }

  drawCursor(context) {
    const { left, top, width, height } = this.box(...this.cursor);
    const style = getComputedStyle(this.canvas);
    for (const [colour, thick] of [[style.backgroundColor, 5], [style.color, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.strokeRect(left - 1.5, top - 1.5, width + 3, height + 3);
    }
  }

  box(row, column) {
    const { left, width } = this.at.columns[column];
    return { left, width, top: this.at.top + row * this.at.rowHeight, height: this.at.rowHeight };
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => this.point(this.hit(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("pointerdown", (event) => this.moveTo(this.hit(event)));
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.moveTo(this.cursor ?? this.first()));
    canvas.addEventListener("blur", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
  }

  hit(event) {
    const frame = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const row = Math.floor((y - this.at.top) / this.at.rowHeight);
    const column = this.at.columns.findIndex(({ left, width }) => x >= left && x < left + width);
    return row >= 0 && row < this.at.rows && column >= 0 && this.describe(row, column) !== null ? [row, column] : null;
  }

  first() {
    for (let row = 0; row < this.at.rows; row += 1) {
      const column = this.at.columns.findIndex((_, index) => this.describe(row, index) !== null);
      if (column >= 0) return [row, column];
    }
    return null;
  }

  press(event) {
    if (event.key === "Escape") this.showTip(null);
    const step = KEYS[event.key];
    if (!step || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.moveTo(this.cursor ? this.neighbour(step) : this.first());
  }

  /** The next cell that is there, or the one of now; steps of several rows stop at the edge. */
  neighbour([down, right]) {
    const [row, column] = this.cursor;
    const last = [this.at.rows - 1, this.at.columns.length - 1];
    const clamp = (value, high) => Math.min(Math.max(value, 0), high);
    const isFar = Math.abs(down) > 1 || !Number.isFinite(right);
    const start = [clamp(row + down, last[0]), clamp(column + right, last[1])];
    const [y, x] = isFar ? [-Math.sign(down), -Math.sign(right)] : [down, right];
    for (let [r, c] = start; r >= 0 && c >= 0 && r <= last[0] && c <= last[1]; r += y, c += x) {
      if (this.describe(r, c) !== null) return [r, c];
      if (y === 0 && x === 0) break;
    }
    return this.cursor;
  }

  moveTo(cell) {
    this.cursor = cell;
    this.draw();
    this.showTip(cell);
    this.said.textContent = cell ? this.describe(...cell) : "";
    if (cell) this.scrollIntoView(cell);
  }

  scrollIntoView(cell) {
    const { left, width } = this.box(...cell);
    const view = this.element.closest(".scroll");
    if (!view) return;
    if (left < view.scrollLeft) view.scrollLeft = left - 20;
    else if (left + width > view.scrollLeft + view.clientWidth) view.scrollLeft = left + width - view.clientWidth + 20;
  }

  point(cell) {
    this.showTip(cell ?? this.cursor);
  }

  showTip(cell) {
    this.tip.hidden = cell === null;
    removeEventListener("scroll", this.followScroll, true);
    if (cell === null) return;
    this.tip.textContent = this.describe(...cell);
    this.followScroll = () => this.placeTip(cell);
    addEventListener("scroll", this.followScroll, true);
    this.placeTip(cell);
  }

  /** In the window's coordinates: what scrolls would cut off what stands out of it. */
  placeTip(cell) {
    if (!this.canvas.isConnected) {
      this.showTip(null); // another page is shown: nothing is to listen for this one
      return;
    }
    const { left, width, top, height } = this.box(...cell);
    const frame = this.canvas.getBoundingClientRect();
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    const above = frame.top + top - this.tip.offsetHeight - 8;
    this.tip.style.left = `${Math.max(8, Math.min(frame.left + left + width / 2 - 20, room))}px`;
    this.tip.style.top = `${above >= 8 ? above : frame.top + top + height + 8}px`;
  }
}

/** Text on a canvas, in the page's type. */
export function write(context, text, x, y, { colour, size = 12, align = "left", weight = "", turned = false }) {
  context.save();
  context.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
  context.fillStyle = colour;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.translate(x, y);
  if (turned) context.rotate(-Math.PI / 2);
  context.fillText(text, 0, 0);
  context.restore();
}
