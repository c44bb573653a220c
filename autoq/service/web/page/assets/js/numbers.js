// Numbers as the command line and the report write them.

export const MISSING = "-";
const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const COUNT_UNITS = ["", " K", " M", " G", " T"];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Two digits at least in the exponent: 1.234e-05. */
function scientific(value, digits) {
  return value.toExponential(digits).replace(/e([+-])(\d)$/, "e$10$2");
}

/** Bits per weight, four decimals: 4.8000. */
export const bitsText = (value) => (isNumber(value) ? value.toFixed(4) : MISSING);

/** A loss, four significant digits or more: 0.01234, 1.234e-05, 2348.7. */
export function lossText(value) {
  if (!isNumber(value)) return MISSING;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e3 && size < 1e6) return value.toFixed(1);
  return size >= 1e-3 && size < 1e3 ? value.toPrecision(4) : scientific(value, 3);
}

/** An interval: 0.01 to 0.02; a side without a bound says so. */
export function intervalText(low, high) {
  const below = isNumber(low) ? lossText(low) : "no lower bound";
  const above = isNumber(high) ? lossText(high) : "no upper bound";
  return `${below} to ${above}`;
}

/** A share, two decimals: 99.21 %; what they cannot show is less than they can. */
export function percentText(value) {
  if (!isNumber(value)) return MISSING;
  return value > 0 && value < 5e-5 ? "< 0.01 %" : `${(value * 100).toFixed(2)} %`;
}

/** A size in 10^9 bytes, four significant digits: 23.41 GB. */
export function gigabytesText(bytes) {
  return isNumber(bytes) ? `${trimmed(bytes / 1e9, 4)} GB` : MISSING;
}

/** A size: 3.21 MiB. */
export function bytesText(value) {
  if (!isNumber(value)) return MISSING;
  let [number, unit] = [value, 0];
  while (Math.abs(number) >= 1024 && unit < BYTE_UNITS.length - 1) [number, unit] = [number / 1024, unit + 1];
  return unit === 0 ? `${number.toFixed(0)} B` : `${number.toFixed(2)} ${BYTE_UNITS[unit]}`;
}

/** How many: 12.3 M; below ten thousand in full. */
export function countText(value) {
  if (!isNumber(value)) return MISSING;
  if (Math.abs(value) < 10_000) return value.toFixed(0);
  let [number, unit] = [value, 0];
  while (Math.abs(number) >= 1000 && unit < COUNT_UNITS.length - 1) [number, unit] = [number / 1000, unit + 1];
  return trimmed(number, 3) + COUNT_UNITS[unit];
}

/** Significant digits, without zeros at the end. */
export function trimmed(value, digits) {
  const text = value.toPrecision(digits);
  if (text.includes("e")) return scientific(value, digits - 1).replace(/\.?0+e/, "e");
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** A duration: 0.42 s, 3 min 05 s, 2 h 05 min. */
export function secondsText(value) {
  if (!isNumber(value)) return MISSING;
  if (value < 60) return `${value.toFixed(2)} s`;
  const whole = Math.round(value);
  const minutes = Math.floor(whole / 60);
  const two = (number) => String(number).padStart(2, "0");
  return minutes < 60 ? `${minutes} min ${two(whole % 60)} s` : `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
}

/** About how long something will still take; nobody believes hundredths of a second of that. */
export function remainingText(seconds) {
  return seconds < 60 ? `${Math.max(1, Math.round(seconds))} s` : secondsText(seconds);
}

/** Minutes in UTC, as `autoq list` has them. */
export function timeText(iso) {
  const date = new Date(iso ?? "");
  return Number.isNaN(date.getTime()) ? MISSING : date.toISOString().slice(0, 16).replace("T", " ");
}

const UNITS = { nats_per_token: "nats per token", relative: "relative units" };

/** The unit of a loss, in words. */
export const unitText = (unit) => UNITS[unit] ?? unit ?? "";

const METRICS = {
  kl_divergence: "KL divergence",
  top1_agreement: "top-1 agreement",
  reference_perplexity: "perplexity of the original",
  kl_median: "KL divergence, median of tokens",
  kl_p90: "KL divergence, 90th percentile of tokens",
  kl_p99: "KL divergence, 99th percentile of tokens",
  kl_unsure: "KL divergence where the original is unsure (below 50 %)",
  kl_likely: "KL divergence where the original is 50 to 90 % sure",
  kl_sure: "KL divergence where the original is at least 90 % sure",
};

/** A metric's name, in words. */
export const metricText = (name) => METRICS[name] ?? name.replaceAll("_", " ");

/** A metric's value in its own style: shares as per cent, the rest as a loss. */
export function metricValueText(name, value) {
  return /(agreement|accuracy)$/.test(name) ? percentText(value) : lossText(value);
}

const LIMITS = {
  effective_bits: (limit) => `${bitsText(limit)} bits`,
  stored_bytes: (limit) => `${gigabytesText(limit)} on disk`,
  active_bits: (limit) => `${bitsText(limit)} active bits`,
  latency_seconds: (limit) => `${trimmed(limit * 1e3, 4)} ms`,
  kl_divergence: (limit) => `KL divergence ${lossText(limit)}`,
};

/** The limits that a plan was solved for. */
export function budgetsText(budgets) {
  const words = Object.entries(budgets ?? {}).map(([name, limit]) =>
    LIMITS[name] ? LIMITS[name](limit) : `${trimmed(limit, 6)} ${name.replaceAll("_", " ")}`,
  );
  return words.join(", ") || MISSING;
}

/** "1 layer", "3 layers". */
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
