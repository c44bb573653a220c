// The report's colours: one per format, the same everywhere, and a ramp for losses. The page's own
// are custom properties of base.css, read from there.

const FORMATS = {
  none: "#9aa3ad",
  fp8: "#3b82c4",
  nvfp4: "#e08a2c",
  w4a8_awq: "#4a9d5b",
  fp8_pc_pt: "#1f4f87",
  fp8_block: "#7db3e8",
  mxfp8: "#2aa3a3",
  mxfp4: "#c94f6d",
  int4_awq: "#7f9c2e",
  int4_dq: "#b9c94a",
  int8_sq: "#5b6fd6",
  int8_wo: "#a15fb3",
  nvfp4_wo: "#8a6d3b",
  nvfp4_svdquant: "#b3541e",
};
const FURTHER = ["#b58db6", "#6b7a55", "#c2b04a", "#4f7f86", "#d48fa0", "#3f3f7a"];

/** The format that leaves weights as they are, and what they are counted at. */
export const NONE = "none";
export const NONE_BITS = 16;

// Light to dark, roughly even steps of lightness.
const RAMP = [
  [253, 231, 176],
  [247, 187, 118],
  [236, 132, 90],
  [207, 76, 87],
  [151, 36, 98],
  [80, 18, 82],
];

/** A colour for each format; the built-in ones always have the same. */
export function formatColours(formats) {
  const further = formats.filter((name) => !Object.hasOwn(FORMATS, name));
  return new Map(
    formats.map((name) => [name, FORMATS[name] ?? FURTHER[further.indexOf(name) % FURTHER.length]]),
  );
}

/** Smallest and largest positive loss; [1, 10] if there is none. */
export function lossRange(losses) {
  let [low, high] = [Infinity, 0];
  for (const loss of losses) {
    if (loss !== null && loss > 0) [low, high] = [Math.min(low, loss), Math.max(high, loss)];
  }
  if (high === 0) return [1, 10];
  return high > low ? [low, high] : [low / 2, high * 2];
}

/** Colour of a loss on the logarithmic ramp from `low` to `high`. */
export function lossColour(loss, low, high) {
  const share = Math.log(Math.max(loss, low) / low) / Math.log(high / low);
  return rampColour(Math.min(Math.max(share, 0), 1));
}

/** Colour at `share` of the ramp, 0 to 1. */
export function rampColour(share) {
  const place = share * (RAMP.length - 1);
  const index = Math.min(Math.floor(place), RAMP.length - 2);
  const fraction = place - index;
  const hex = RAMP[index].map((start, channel) =>
    Math.round(start + (RAMP[index + 1][channel] - start) * fraction).toString(16).padStart(2, "0"),
  );
  return `#${hex.join("")}`;
}

/** Black or white, whichever is read more easily on a colour. */
export function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((start) => {
    const channel = parseInt(colour.slice(start, start + 2), 16) / 255;
    return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return luminance > 0.179 ? "#000000" : "#ffffff";
}

/** What custom properties come to in the theme of now, for what is not drawn by CSS. */
export function themeColours() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const resolved = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const names = ["page", "panel", "line", "text", "quiet", "accent", "curve", "measured"];
  const colours = Object.fromEntries(names.map((name) => [name, resolved(name)]));
  probe.remove();
  return colours;
}
