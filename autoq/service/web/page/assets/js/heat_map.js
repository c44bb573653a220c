// Layer by format: how much each decision would lose, and what was decided.

import { NONE, inkOn, lossColour, lossRange, rampColour, themeColours } from "./colours.js";
import { el, fill, table } from "./dom.js";
import { GridCanvas, write } from "./grid_canvas.js";
import { cellKey, panels, parentOf, shortType } from "./layers.js";
import { lossText, trimmed, unitText } from "./numbers.js";

const LEFT = 66;
const TYPE_GAP = 14;
const LINE = 15;

/** The heat map of a study, with its scale, and a table that says the same. */
export class HeatMap {
  /** @param {object} data the reply of /sensitivity */
  constructor(data) {
    this.data = data;
    this.order = formatOrder(data);
    this.range = lossRange(scoresOf(data));
    this.chosen = {};
    this.pictures = panels(data.groups).map((panel) => new HeatPanel(panel, this));
    this.scale = el("canvas.ramp", { role: "img", "aria-label": `Colour scale, from ${lossText(this.range[0])} to ${lossText(this.range[1])} ${unitText(data.unit)}` });
    this.element = el(
      "div",
      {},
      el("div.ramp-row", {}, this.scale, el("span.quiet.small", {}, `predicted loss if only this group takes the format (${unitText(data.unit)}, log scale)`)),
      this.pictures.map((picture) => [this.pictures.length > 1 ? el("h3", {}, picture.panel.title) : null, picture.element]),
      this.alternative(),
    );
  }

  /** Fit it to the width that there is, and to the colours of now. */
  draw(width) {
    this.colours = themeColours();
    drawScale(this.scale, this.range, this.colours);
    for (const picture of this.pictures) picture.draw(width);
  }

  /** Mark what a plan takes. */
  choose(assignment) {
    this.chosen = assignment;
    for (const picture of this.pictures) picture.grid.at && picture.grid.draw();
  }

  /** What is known of a group in a format. */
  words(index, format) {
    const group = this.data.groups[index];
    const column = this.data.formats.indexOf(format);
    const [score, error, bits] = [this.data.scores, this.data.standard_errors, this.data.effective_bits].map((rows) => rows[index][column]);
    const chosen = this.chosen[group.name] === format ? "\nchosen" : "";
    return `${group.name}\n${format}${typeof bits === "number" ? `, ${trimmed(bits, 4)} bits` : ""}: ${lossWords(format, score, error)}${chosen}`;
  }

  /** The same as a table, made when it is opened: it is long. */
  alternative() {
    const place = el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Sensitivity as a table" });
    const open = (event) => event.target.open && fill(place, this.asTable());
    return el("details", { ontoggle: open }, el("summary", {}, "As a table"), place);
  }

  asTable() {
    const { groups, scores, standard_errors: errors, formats } = this.data;
    const head = ["group", "chosen", ...this.order.map((format) => ({ text: format, number: true }))];
    const rows = groups.map((group, index) => [
      group.name,
      this.chosen[group.name] ?? "",
      ...this.order.map((format) => {
        const column = formats.indexOf(format);
        const [score, error] = [scores[index][column], errors[index][column]];
        return score === null || error === null ? lossText(score) : `${lossText(score)} ± ${lossText(error)}`;
      }),
    ]);
    return table(head, rows, { caption: `Predicted loss of each group in each format, ± standard error (${unitText(this.data.unit)})` });
  }
}

class HeatPanel {
  constructor(panel, map) {
    this.panel = panel;
    this.map = map;
    this.spots = panel.columns.flatMap((type) => map.order.map((format) => ({ type, format })));
    this.grid = new GridCanvas({
      label: `Sensitivity of ${panel.title} by layer and format`,
      describe: (row, column) => this.describe(row, column),
      paint: (context) => this.paint(context),
    });
    this.element = el("div.scroll", {}, this.grid.element);
  }

  describe(row, column) {
    const { type, format } = this.spots[column];
    const index = this.panel.cells.get(cellKey(this.panel.rows[row], type));
    return index === undefined ? null : this.map.words(index, format);
  }

  draw(width) {
    const { columns, rows } = this.panel;
    const formats = this.map.order.length;
    const room = (width - LEFT) / columns.length - TYPE_GAP;
    this.cell = Math.min(Math.max(Math.floor(room / formats), 13), 46);
    this.typeWidth = Math.max(this.cell * formats, 7 * Math.max(...columns.map((type) => Math.max(parentOf(type).length, shortType(type).length))));
    this.rowHeight = Math.min(22, Math.max(4, Math.floor(1000 / rows.length)));
    const longest = Math.max(...this.map.order.map((format) => format.length));
    this.header = 2 * LINE + 14 + longest * 6.6;
    this.background = null;
    const places = columns.flatMap((_, type) => this.map.order.map((_, format) => ({ left: LEFT + type * (this.typeWidth + TYPE_GAP) + format * this.cell, width: this.cell })));
    this.grid.place({
      width: LEFT + columns.length * (this.typeWidth + TYPE_GAP),
      height: this.header + rows.length * this.rowHeight + 8,
      top: this.header,
      rowHeight: this.rowHeight,
      rows: rows.length,
      columns: places,
    });
  }

  /** Cells are painted once for a size and a theme; a plan only changes the marks on them. */
  paint(context) {
    this.background ??= this.paintedBackground();
    const { width, height } = this.grid.at;
    context.drawImage(this.background, 0, 0, width, height);
    this.paintMarks(context);
  }

  paintedBackground() {
    const canvas = document.createElement("canvas");
    canvas.width = this.grid.canvas.width;
    canvas.height = this.grid.canvas.height;
    const context = canvas.getContext("2d");
    context.scale(canvas.width / this.grid.at.width, canvas.height / this.grid.at.height);
    this.paintHeaders(context);
    this.paintCells(context);
    return canvas;
  }

  paintHeaders(context) {
    const { text, quiet } = this.map.colours;
    this.panel.columns.forEach((type, index) => {
      const left = LEFT + index * (this.typeWidth + TYPE_GAP);
      write(context, parentOf(type), left + 1, 9, { colour: quiet, weight: "600" });
      write(context, shortType(type), left + 1, 9 + LINE, { colour: text, weight: "600" });
    });
    const size = Math.min(11.5, this.cell - 1);
    this.spots.forEach(({ format }, index) => {
      const { left, width } = this.grid.at.columns[index];
      write(context, format, left + width / 2, this.header - 6, { colour: quiet, size, turned: true });
    });
    const every = Math.max(1, Math.ceil(14 / this.rowHeight));
    this.panel.rows.forEach((row, index) => {
      const isShown = row !== "" && (every === 1 || index % niceEvery(every) === 0);
      if (isShown) write(context, `block ${row}`, LEFT - 8, this.header + (index + 0.5) * this.rowHeight, { colour: quiet, size: 11.5, align: "right" });
    });
  }

  paintCells(context) {
    const { line, panel } = this.map.colours;
    const gap = this.rowHeight >= 8 ? 1 : 0;
    this.eachCell(({ left, top, width, height }, index, format) => {
      const score = this.score(index, format);
      const isEmpty = format === NONE || score === 0;
      if (isEmpty) {
        context.fillStyle = panel;
        context.fillRect(left, top, width - 1, height - gap);
        return;
      }
      context.fillStyle = score === null ? line : lossColour(score, ...this.map.range);
      context.fillRect(left, top, width - 1, height - gap);
      if (score === null) this.paintBar(context, left, top, width, height);
    });
  }

  /** A stroke through what a group cannot take: grey alone would be a matter of colour. */
  paintBar(context, left, top, width, height) {
    context.strokeStyle = this.map.colours.quiet;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(left + 2, top + height - 2);
    context.lineTo(left + width - 3, top + 1);
    context.stroke();
  }

  paintMarks(context) {
    const { page, text } = this.map.colours;
    this.eachCell(({ left, top, width, height }, index, format) => {
      if (this.map.chosen[this.map.data.groups[index].name] !== format) return;
      if (height >= 11) {
        for (const [colour, thick] of [[page, 5], [text, 2.2]]) {
          context.strokeStyle = colour;
          context.lineWidth = thick;
          context.strokeRect(left + 2, top + 2, width - 5, height - 5);
        }
        return;
      }
      const score = this.score(index, format);
      const isPlain = format === NONE || score === null || score === 0;
      context.fillStyle = isPlain ? text : inkOn(lossColour(score, ...this.map.range));
      const wide = Math.min(8, width * 0.5);
      const high = Math.max(2, height * 0.45);
      context.fillRect(left + (width - 1 - wide) / 2, top + (height - high) / 2, wide, high);
    });
  }

  score(index, format) {
    return this.map.data.scores[index][this.map.data.formats.indexOf(format)];
  }

  eachCell(use) {
    this.panel.rows.forEach((row, rowIndex) => {
      this.panel.columns.forEach((type, typeIndex) => {
        const index = this.panel.cells.get(cellKey(row, type));
        if (index === undefined) return;
        this.map.order.forEach((format, formatIndex) => use(this.grid.box(rowIndex, typeIndex * this.map.order.length + formatIndex), index, format));
      });
    });
  }
}

/** A round step of row numbers: 2, 5, 10, 20. */
function niceEvery(least) {
  return [1, 2, 5, 10, 20, 50, 100].find((step) => step >= least) ?? least;
}

function lossWords(format, score, error) {
  if (format === NONE) return "no loss";
  if (score === null) return "cannot take this format";
  return `loss ${lossText(score)}${error === null ? "" : ` (standard error ${lossText(error)})`}`;
}

function* scoresOf({ scores, formats }) {
  const none = formats.indexOf(NONE);
  for (const row of scores) for (const [index, score] of row.entries()) if (index !== none) yield score;
}

/** Formats by falling bits, so that a row reads from what loses least to what loses most. */
export function formatOrder({ formats, effective_bits: bits }) {
  const of = (format) => {
    const column = formats.indexOf(format);
    const known = bits.map((row) => row[column]).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 0;
  };
  const size = new Map(formats.map((format) => [format, of(format)]));
  return [...formats].sort((one, other) => size.get(other) - size.get(one));
}

function drawScale(canvas, [low, high], colours) {
  const [width, height, bar] = [300, 36, 280];
  const scale = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [width * scale, height * scale];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  for (let x = 0; x < bar; x += 1) {
    context.fillStyle = rampColour(x / (bar - 1));
    context.fillRect(10 + x, 2, 1.5, 14);
  }
  for (const [tick, place] of ticks(low, high, bar)) write(context, tick, 10 + place, 27, { colour: colours.quiet, size: 11.5, align: "center" });
}

/** Powers of ten, with 2 and 5 between them where there are few, not nearer than can be read. */
function ticks(low, high, width) {
  const decades = Math.log10(high / low);
  const sizes = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5];
  const found = [];
  for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.log10(high); exponent += 1) {
    for (const size of sizes) {
      const value = size * 10 ** exponent;
      const place = (Math.log10(value / low) / decades) * width;
      const isApart = !found.length || place - found.at(-1)[1] > 44;
      if (value >= low && value <= high && isApart) found.push([`${size}e${exponent}`, place]);
    }
  }
  return found;
}

