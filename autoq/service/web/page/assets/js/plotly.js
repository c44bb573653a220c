// Plotly, loaded when a chart is first wanted, under a policy that allows no inline styles.

let loading = null;

/** The library; the first call fetches it. */
export function plotly() {
  loading ??= load();
  return loading;
}

/**
 * The library sets the attribute `style`, which the policy forbids, where the property does the same
 * and is allowed; and on loading it puts a style sheet for maps, which are not used here, into the
 * head. Both are led around, so that the policy can stay as it is.
 */
async function load() {
  takeStyleAttributesAsProperties();
  const release = keepStyleElementsOut(document.head);
  try {
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = "/assets/plotly.min.js";
      script.onload = resolve;
      script.onerror = () => reject(new Error("the charting library could not be loaded"));
      document.body.append(script);
    });
  } finally {
    release();
  }
  return window.Plotly;
}

function takeStyleAttributesAsProperties() {
  const native = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function setAttribute(name, value) {
    if (name === "style") this.style.cssText = value;
    else native.call(this, name, value);
  };
}

function keepStyleElementsOut(head) {
  head.appendChild = (node) => (node instanceof HTMLStyleElement ? node : Node.prototype.appendChild.call(head, node));
  return () => delete head.appendChild;
}
