// Light and dark: the system's, or the one that was chosen here.

const KEY = "autoq-theme";
const listeners = new Set();
const root = document.documentElement;

/** Call `listener` whenever colours change, until the signal. */
export function onThemeChange(listener, signal) {
  listeners.add(listener);
  signal.addEventListener("abort", () => listeners.delete(listener));
}

function changed() {
  for (const listener of listeners) listener();
}

function choose(theme) {
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  try {
    if (theme === "auto") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, theme);
  } catch {
    // Storage is switched off: the choice holds for this page.
  }
  changed();
}

/** Connect the switch in the header. */
export function setUpTheme() {
  const control = document.getElementById("theme");
  control.value = root.dataset.theme ?? "auto";
  control.addEventListener("change", () => choose(control.value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
}
