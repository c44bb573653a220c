// Elements are made here and nowhere else; text goes in as text, so names of studies and layers
// can never become markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element.
 * @param {string} name tag, with classes after dots: "div.tile.wide"
 * @param {object} attributes `on*` are listeners; null, undefined and false are left out
 * @param {...(Node|string|number|null|Array)} children
 */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "value") made.value = value;
    else if (key === "checked") made.checked = value;
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  append(made, children);
  return made;
}

/** Children, nested lists of them included; strings become text. */
export function append(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Put other children in the place of what is there. */
export function fill(parent, ...children) {
  parent.replaceChildren();
  append(parent, children);
  return parent;
}

/** As `fill`, of what is drawn again and again: whoever stands on a link or control stays there. */
export function refill(parent, ...children) {
  const keyOf = (control) => control.getAttribute("href") ?? control.getAttribute("aria-label") ?? control.textContent;
  const key = parent.contains(document.activeElement) ? keyOf(document.activeElement) : null;
  fill(parent, ...children);
  if (key === null) return;
  const same = [...parent.querySelectorAll("a, button, input")].find((control) => keyOf(control) === key);
  same?.focus({ preventScroll: true });
}

/** A part of the page under its heading. */
export function section(title, ...children) {
  const id = `part-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), ...children);
}

/** One number, large, with what it is above it and more about it below. */
export function tile(name, value, more = "") {
  return el("div.tile", {}, el("span.name", {}, name), el("b", {}, value), el("span.more", {}, more));
}

/**
 * A table.
 * @param {Array} head titles of columns; {text, number: true} stands at the right
 * @param {Array<Array>} rows cells: text or nodes
 */
export function table(head, rows, { caption = null, kind = "" } = {}) {
  const columns = head.map((cell) => (typeof cell === "object" && !(cell instanceof Node) ? cell : { text: cell }));
  const style = (index) => (columns[index]?.number ? "number" : columns[index]?.fixed ? "fixed" : null);
  return el(
    `table${kind}`,
    {},
    caption && el("caption.visually-hidden", {}, caption),
    el("thead", {}, el("tr", {}, columns.map((column, index) => el("th", { scope: "col", class: style(index) }, column.text)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, index) => el("td", { class: style(index) }, cell))))),
  );
}

/** Names and values. */
export function definitions(pairs) {
  return el("dl", {}, pairs.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

let serial = 0;

/** An id that nothing else on the page has. */
export function freshId(prefix = "id") {
  serial += 1;
  return `${prefix}-${serial}`;
}

let waiting = null;

/** Say something to screen readers once things have been quiet for a moment. */
export function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    document.getElementById("announcer").textContent = text;
  }, 700);
}

/** A link within the page's own routes. */
export function link(href, ...children) {
  return el("a", { href, "data-route": true }, ...children);
}

/** A small square of a colour, beside the name that says the same. */
export function swatch(colour) {
  const made = document.createElementNS(SVG, "svg");
  for (const [key, value] of [["width", 13], ["height", 13], ["class", "swatch"], ["aria-hidden", "true"]]) made.setAttribute(key, value);
  const square = document.createElementNS(SVG, "rect");
  for (const [key, value] of [["width", 13], ["height", 13], ["rx", 3], ["fill", colour]]) square.setAttribute(key, value);
  made.append(square);
  return made;
}
