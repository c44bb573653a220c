// The plan: layers in order, coloured by the format that each takes, and marked where it moved.

import { NONE, NONE_BITS, formatColours, inkOn, themeColours } from "./colours.js";
import { el, fill, swatch } from "./dom.js";
import { GridCanvas, write } from "./grid_canvas.js";
import { cellKey, panels, parentOf, shortType } from "./layers.js";
import { countText, lossText, plural, trimmed } from "./numbers.js";

const ROW = 28;
const CELL = 18;
const LANE = 3; // for marks of what moved, above and below the cells

/** The strip of a plan; `show` draws another plan. */
export class PlanStrip {
  /** @param {object} data the reply of /sensitivity */
  constructor(data) {
    this.data = data;
    this.column = new Map(data.formats.map((format, index) => [format, index]));
    this.formats = [...data.formats.filter((format) => format !== NONE), NONE]; // not scored: it loses nothing
    this.formatColours = formatColours(this.formats);
    this.assignment = {};
    this.reference = {};
    this.legend = el("p.legend");
    this.pictures = panels(data.groups).map((panel) => new StripPanel(panel, this));
    this.element = el("div", {}, this.legend, this.pictures.map((picture) => [this.pictures.length > 1 ? el("h3", {}, picture.panel.title) : null, picture.element]));
  }

  draw(width) {
    this.colours = themeColours();
    for (const picture of this.pictures) picture.draw(width);
  }

  show(assignment, reference) {
    this.assignment = assignment;
    this.reference = reference;
    fill(this.legend, this.counts());
    for (const picture of this.pictures) picture.grid.at && picture.grid.draw();
  }

  /** How many groups and weights take each format. */
  counts() {
    const total = this.data.groups.reduce((sum, group) => sum + group.weights, 0) || 1;
    const taken = new Map();
    for (const group of this.data.groups) {
      const format = this.assignment[group.name];
      const [count, weights] = taken.get(format) ?? [0, 0];
      taken.set(format, [count + 1, weights + group.weights]);
    }
    return this.formats.filter((format) => taken.has(format)).map((format) => {
      const [count, weights] = taken.get(format);
      return el("span.legend-entry", {}, swatch(this.formatColours.get(format)), el("b", {}, format), ` ${plural(count, "group")}, ${((weights / total) * 100).toFixed(1)} % of the weights`);
    });
  }

  bits(index, format) {
    return this.data.effective_bits[index][this.column.get(format)] ?? (format === NONE ? NONE_BITS : null);
  }

  /** Above zero where a group has more bits than in the reference, below where fewer. */
  movement(index) {
    const { name } = this.data.groups[index];
    const [now, before] = [this.assignment[name], this.reference[name]];
    if (now === undefined || before === undefined || now === before) return 0;
    return (this.bits(index, now) ?? 0) >= (this.bits(index, before) ?? 0) ? 1 : -1;
  }

  words(index) {
    const group = this.data.groups[index];
    const format = this.assignment[group.name];
    const bits = this.bits(index, format);
    const before = this.movement(index) ? `, was ${this.reference[group.name]}` : "";
    const score = format === NONE ? 0 : this.data.scores[index][this.column.get(format)];
    return `${group.name}\n${format ?? "-"}${bits === null ? "" : ` (${trimmed(bits, 4)} bits)`}${before}\n${countText(group.weights)} weights, loss ${lossText(score)}`;
  }
}

class StripPanel {
  constructor(panel, strip) {
    this.panel = panel;
    this.strip = strip;
    this.grid = new GridCanvas({
      label: `Formats of ${panel.title}`,
      describe: (row, column) => {
        const index = this.index(row, column);
        return index === undefined ? null : strip.words(index);
      },
      paint: (context) => this.paint(context),
    });
    this.element = el("div.scroll", {}, this.grid.element);
  }

  // The picture lies on its side: types are rows, blocks are columns.
  index(row, column) {
    return this.panel.cells.get(cellKey(this.panel.rows[column], this.panel.columns[row]));
  }

  draw(width) {
    const names = this.panel.columns.map((type) => [parentOf(type), shortType(type)].filter(Boolean).join("."));
    this.names = names;
    this.left = 20 + 6.9 * Math.max(...names.map((name) => name.length));
    const blocks = this.panel.rows.length;
    this.width = Math.min(64, Math.max(3.4, (width - this.left - 6) / blocks));
    this.grid.place({
      width: this.left + blocks * this.width + 6,
      height: names.length * ROW + 26,
      top: 2,
      rowHeight: ROW,
      rows: names.length,
      columns: this.panel.rows.map((_, index) => ({ left: this.left + index * this.width, width: this.width })),
    });
  }

  paint(context) {
    const { text, quiet } = this.strip.colours;
    this.names.forEach((name, row) => {
      write(context, name, this.left - 10, 2 + row * ROW + ROW / 2, { colour: text, align: "right", size: 12.5 });
      this.panel.rows.forEach((_, column) => this.paintCell(context, row, column));
    });
    const every = [1, 2, 5, 10, 20, 50].find((step) => step * this.width >= 26) ?? 100;
    const bottom = 2 + this.names.length * ROW + 10;
    this.panel.rows.forEach((name, column) => {
      if (column % every === 0 && name !== "") write(context, name, this.left + (column + 0.5) * this.width, bottom, { colour: quiet, align: "center", size: 11.5 });
    });
  }

  paintCell(context, row, column) {
    const index = this.index(row, column);
    const format = index === undefined ? undefined : this.strip.assignment[this.strip.data.groups[index].name];
    if (format === undefined) return;
    const { left, top, width } = this.grid.box(row, column);
    const gap = width > 6 ? 1 : 0.4;
    const colour = this.strip.formatColours.get(format) ?? this.strip.colours.quiet;
    context.fillStyle = colour;
    context.fillRect(left, top + (ROW - CELL) / 2, width - gap, CELL);
    const bits = this.strip.bits(index, format);
    if (width >= 20 && bits !== null) write(context, trimmed(bits, 2), left + (width - gap) / 2, top + ROW / 2, { colour: inkOn(colour), size: 11, align: "center" });
    this.paintMovement(context, index, left, top, width - gap);
  }

  /** A bar above a cell that has more bits than before, below one that has fewer. */
  paintMovement(context, index, left, top, width) {
    const movement = this.strip.movement(index);
    if (movement === 0) return;
    context.fillStyle = this.strip.colours.text;
    context.fillRect(left, movement > 0 ? top + 1 : top + ROW - 1 - LANE, width, LANE);
  }
}
