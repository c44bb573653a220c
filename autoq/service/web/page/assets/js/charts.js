// Charts: loss against bits, predicted against measured, trials.

import { themeColours } from "./colours.js";
import { el, fill } from "./dom.js";
import { bitsText, intervalText, lossText } from "./numbers.js";
import { plotly } from "./plotly.js";
import { onThemeChange } from "./theme.js";

const FONT = 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif';
const LINES = ["#3b82c4", "#e08a2c", "#4a9d5b", "#a15fb3", "#c94f6d", "#2aa3a3", "#8a6d3b", "#5b6fd6"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

/** A chart that is drawn once the library is there, and again when the colours change. */
export class Chart {
  /**
   * @param {string} label what it shows, for screen readers
   * @param {(colours: object) => {data: Array, layout: object}} make
   * @param {(point: object) => void} onClick
   */
  constructor({ label, make, onClick = null, signal, height = 380 }) {
    Object.assign(this, { make, onClick, signal, height });
    this.place = el("div.chart", { role: "img", "aria-label": label });
    this.place.style.height = `${height}px`;
    this.element = this.place;
    onThemeChange(() => this.draw(), signal);
  }

  /** Draw it, or draw it again. */
  async draw() {
    let library;
    try {
      library = await plotly();
    } catch (error) {
      fill(this.place, el("p.quiet", {}, `${error.message}; the tables say the same.`));
      return;
    }
    if (this.signal.aborted || !this.place.isConnected) return;
    const { data, layout } = this.make(themeColours());
    await library.react(this.place, data, this.layoutWith(layout), { displayModeBar: false, responsive: true, doubleClick: "reset" });
    if (this.onClick && !this.isListening) this.place.on("plotly_click", (event) => this.onClick(event.points[0]));
    this.isListening = true;
    this.isDrawn = true;
  }

  /** Move a trace's points, cheaply. */
  async move(trace, x, y, text) {
    if (!this.isDrawn) return;
    const library = await plotly();
    library.restyle(this.place, { x: [x], y: [y], hovertext: [text] }, [trace]);
  }

  layoutWith({ xaxis, yaxis, ...further }) {
    const colours = themeColours();
    const axis = {
      gridcolor: colours.line, linecolor: colours.line, zeroline: false, tickfont: { color: colours.quiet, size: 12 },
      title: { font: { color: colours.quiet, size: 13 } }, automargin: true, fixedrange: true,
    };
    const merged = (given) => ({ ...axis, ...given, title: { ...axis.title, ...given.title } });
    return {
      height: this.height,
      margin: { l: 70, r: 16, t: 12, b: 52 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, color: colours.text, size: 12 },
      hovermode: "closest",
      hoverlabel: { bgcolor: colours.panel, bordercolor: colours.line, font: { color: colours.text, family: FONT, size: 12 }, align: "left" },
      legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { color: colours.text } },
      dragmode: false,
      xaxis: merged(xaxis),
      yaxis: merged(yaxis),
      ...further,
    };
  }
}

/** A logarithmic axis with labels as the report has them: 0.01, 1e-5. */
export function logAxis(title, values) {
  const positive = values.filter((value) => value > 0);
  const [low, high] = positive.length ? [Math.min(...positive), Math.max(...positive)] : [1, 10];
  const decades = Math.log10(high / low);
  const sizes = decades > 2.5 ? [1] : decades > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const ticks = [];
  for (let exponent = Math.floor(Math.log10(low)) - 1; exponent <= Math.log10(high) + 1; exponent += 1) for (const size of sizes) ticks.push(size * 10 ** exponent);
  const margin = Math.max(decades * 0.06, 0.1);
  return {
    type: "log",
    title: { text: title },
    tickvals: ticks,
    ticktext: ticks.map((tick) => (tick >= 1e-3 && tick < 1e4 ? String(Number(tick.toPrecision(3))) : tick.toExponential().replace("+", ""))),
    range: [Math.log10(low) - margin, Math.log10(high) + margin],
  };
}

const spread = (values, intervals) => ({
  type: "data",
  symmetric: false,
  array: values.map((value, index) => Math.max((intervals[index]?.[1] ?? value) - value, 0)),
  arrayminus: values.map((value, index) => Math.max(value - (intervals[index]?.[0] ?? value), 0)),
  thickness: 1.3,
  width: 3,
});

/** A band between the ends of points' intervals; ends at or below zero stay out of a log axis. */
function band(points, colour, name) {
  const known = points.filter((point) => point.predicted_loss > 0 && point.predicted_loss_interval.every((end) => end > 0));
  const x = known.map((point) => point.effective_bits);
  const shared = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, x };
  return [
    { ...shared, y: known.map((point) => point.predicted_loss_interval[0]) },
    { ...shared, y: known.map((point) => point.predicted_loss_interval[1]), fill: "tonexty", fillcolor: faded(colour, 0.16), name },
  ];
}

const faded = (colour, share) => (colour.startsWith("#") ? `${colour}${Math.round(share * 255).toString(16).padStart(2, "0")}` : colour.replace("rgb(", "rgba(").replace(")", `, ${share})`));

const planWords = (plan) => `${bitsText(plan.effective_bits)} bits<br>predicted ${lossText(plan.predicted_loss)}<br>${intervalText(...plan.predicted_loss_interval)}`;

/** Index of the marker's trace among those of `frontierFigure`. */
export const MARKER = 3;

/** Plotly reads some tags in text; names are shown as they are. */
export const plainText = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** Loss against bits: the frontier with its intervals, the plan of now, stored and measured plans. */
export function frontierFigure({ frontier, plan, stored, measured, unit }, colours) {
  const points = frontier.points.filter((point) => point.predicted_loss > 0);
  const known = stored.filter((one) => one.predicted_loss > 0);
  const all = [...points, ...known].map((one) => one.predicted_loss).concat(measured.flatMap((one) => [one.value, ...(one.interval ?? [])]), plan.predicted_loss);
  const data = [
    ...band(points, colours.curve, "95 %"),
    { name: "best plan for each budget", x: points.map((one) => one.effective_bits), y: points.map((one) => one.predicted_loss), mode: "lines+markers", line: { color: colours.curve, width: 1.8 }, marker: { size: 5, color: colours.curve }, hovertext: points.map(planWords), hoverinfo: "text" },
    { name: "this plan", x: [plan.effective_bits], y: [plan.predicted_loss], mode: "markers", zorder: 5, marker: { size: 14, symbol: "diamond", color: colours.accent, line: { color: colours.page, width: 1.5 } }, hovertext: [planWords(plan)], hoverinfo: "text", cliponaxis: false },
    { name: "stored plans", x: known.map((one) => one.effective_bits), y: known.map((one) => one.predicted_loss), mode: "markers", marker: { size: 11, symbol: "square-open", color: colours.text, line: { width: 1.8 } }, hovertext: known.map((one) => `${plainText(one.label)}<br>${planWords(one)}`), hoverinfo: "text" },
    { name: "measured KL divergence, 95 %", x: measured.map((one) => one.effective_bits), y: measured.map((one) => one.value), error_y: { ...spread(measured.map((one) => one.value), measured.map((one) => one.interval)), color: colours.measured }, mode: "markers", marker: { size: 9, color: colours.measured, symbol: "circle", line: { color: colours.page, width: 1 } }, hovertext: measured.map((one) => `${plainText(one.label)}<br>measured ${lossText(one.value)}${one.interval ? `<br>${intervalText(...one.interval)}` : ""}`), hoverinfo: "text" },
  ];
  const layout = { xaxis: { title: { text: "effective bits per weight" } }, yaxis: logAxis(`loss (${unit}, log scale)`, all) };
  return { data: data.filter((trace, index) => index <= MARKER || trace.x.length), layout };
}

/** Frontiers of several studies; each has a symbol and a dash of its own beside its colour. */
export function comparisonFigure(frontiers, unit, colours) {
  const data = frontiers.flatMap(({ name, frontier, plan }, index) => {
    const points = frontier.points.filter((point) => point.predicted_loss > 0);
    const colour = LINES[index % LINES.length];
    const symbol = SYMBOLS[index % SYMBOLS.length];
    const words = (one) => `${plainText(name)}<br>${planWords(one)}`;
    const line = { name: plainText(name), x: points.map((one) => one.effective_bits), y: points.map((one) => one.predicted_loss), mode: "lines+markers", line: { color: colour, width: 1.8, dash: DASHES[index % DASHES.length] }, marker: { color: colour, size: 6, symbol }, hovertext: points.map(words), hoverinfo: "text" };
    const chosen = plan && { x: [plan.effective_bits], y: [plan.predicted_loss], mode: "markers", showlegend: false, marker: { color: colour, size: 15, symbol, line: { color: colours.text, width: 2 } }, hovertext: [`its plan<br>${words(plan)}`], hoverinfo: "text" };
    return [...band(points, colour, name), line, chosen].filter(Boolean);
  });
  const all = data.flatMap((trace) => (trace.mode === "lines" ? [] : trace.y));
  return { data, layout: { xaxis: { title: { text: "effective bits per weight" } }, yaxis: logAxis(`predicted loss (${unit}, log scale)`, all) } };
}

/** Predicted against measured, both on logarithmic axes; the diagonal is where they agree. */
export function validationFigure(plans, trials, unit, colours) {
  const all = [...plans, ...trials].flatMap((one) => [one.predicted, one.measured, ...(one.interval ?? [])]).filter((value) => value > 0);
  const [low, high] = [Math.min(...all) / 1.5, Math.max(...all) * 1.5];
  const points = (name, list, marker, further = {}) => ({ name, x: list.map((one) => one.predicted), y: list.map((one) => one.measured), mode: "markers", marker, hovertext: list.map((one) => `${plainText(one.label)}<br>predicted ${lossText(one.predicted)}<br>measured ${lossText(one.measured)}`), hoverinfo: "text", ...further });
  const data = [
    { name: "equal", x: [low, high], y: [low, high], mode: "lines", line: { color: colours.quiet, width: 1.4, dash: "dash" }, hoverinfo: "skip" },
    points("trials", trials, { size: 7, color: colours.curve, symbol: "triangle-up", opacity: 0.75 }),
    points("plans", plans, { size: 10, color: colours.measured, line: { color: colours.page, width: 1 } }, { error_y: { ...spread(plans.map((one) => one.measured), plans.map((one) => one.interval)), color: colours.measured } }),
  ];
  return { data: data.filter((trace) => trace.x.length), layout: { xaxis: logAxis(`predicted loss (${unit})`, all), yaxis: logAxis(`measured (${unit})`, all) } };
}

/** What each trial measured, in their order, and the best so far. */
export function trialsFigure(trials, colours) {
  const done = trials.filter((trial) => trial.values.length && trial.values[0] > 0);
  let least = Infinity;
  const best = done.map((trial) => (least = Math.min(least, trial.values[0])));
  const numbers = done.map((trial) => trial.number);
  const data = [
    { name: "trial", x: numbers, y: done.map((trial) => trial.values[0]), mode: "markers", marker: { size: 7, color: colours.curve }, hovertext: done.map((trial) => `trial ${trial.number}<br>${lossText(trial.values[0])}${trial.effective_bits ? `<br>${bitsText(trial.effective_bits)} bits` : ""}`), hoverinfo: "text" },
    { name: "best so far", x: numbers, y: best, mode: "lines", line: { color: colours.accent, width: 1.6, shape: "hv" }, hoverinfo: "skip" },
  ];
  return { data, layout: { xaxis: { title: { text: "trial" } }, yaxis: logAxis("objective (log scale)", done.map((trial) => trial.values[0])) } };
}
