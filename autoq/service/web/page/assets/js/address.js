// What the address says, and how it changes without a page load.

let draw = () => {};
let shown = whatIsNamed();

function whatIsNamed() {
  return location.pathname + location.search;
}

/** The parameters of the address. */
export const parameters = () => new URLSearchParams(location.search);

/** Change parameters in place: a link to here shows the same. Null takes one away. */
export function setParameters(changes) {
  const query = parameters();
  for (const [key, value] of Object.entries(changes)) {
    query.delete(key);
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(key, one);
    }
  }
  const text = query.toString();
  history.replaceState(null, "", text ? `${location.pathname}?${text}` : location.pathname);
  shown = whatIsNamed();
}

/** Go to another page of this application. */
export function navigate(address) {
  history.pushState(null, "", address);
  draw();
}

/** Links with `data-route`, and the browser's own buttons, go through `show`. */
export function setUpRoutes(show) {
  draw = () => {
    shown = whatIsNamed();
    show();
  };
  addEventListener("popstate", () => {
    if (whatIsNamed() !== shown) draw(); // a link within the page names the same
  });
  document.addEventListener("click", (event) => {
    const anchor = event.target.closest?.("a[data-route]");
    const modified = event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey;
    if (!anchor || modified || anchor.origin !== location.origin) return;
    event.preventDefault();
    navigate(anchor.href);
  });
}
