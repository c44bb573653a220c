// Before the first paint, so that nobody who chose dark sees a flash of white.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("autoq-theme");
  } catch {
    // Storage is switched off: the system's colours it is.
  }
  if (chosen === "light" || chosen === "dark") {
    document.documentElement.dataset.theme = chosen;
  }
})();
