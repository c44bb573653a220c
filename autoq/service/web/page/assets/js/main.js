// Starts the page and shows what the address names.

import { setUpRoutes } from "./address.js";
import { Problem, get, onUnauthorized, token } from "./api.js";
import { el, fill, link } from "./dom.js";
import { showCompare } from "./compare.js";
import { showHome } from "./home.js";
import { showJob } from "./job.js";
import { showSignIn } from "./sign_in.js";
import { showStudy } from "./study.js";
import { setUpTheme } from "./theme.js";

const ROUTES = [
  [/^\/$/, showHome],
  [/^\/studies\/(.+)$/, showStudy],
  [/^\/jobs\/([^/]+)$/, showJob],
  [/^\/compare$/, showCompare],
];

const main = document.getElementById("main");
let shown = new AbortController();

/** Show what the address names; what was shown before stops its requests and listeners. */
async function show() {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  markCurrent();
  main.replaceChildren();
  try {
    const [view, name] = viewOf(location.pathname);
    await view(main, { name, signal, identity: () => identity });
    if (!signal.aborted) focusHeading();
  } catch (error) {
    if (signal.aborted || error.name === "AbortError" || error.status === 401) return;
    if (!(error instanceof Problem)) console.error(error);
    const title = error.title || "This cannot be shown";
    document.title = `${title} - autoq`;
    fill(main, el("p.way", {}, link("/", "Studies")), el("h1", {}, title), el("div.note.bad-note", { role: "alert" }, el("p", {}, error.message)));
    focusHeading();
  }
}

function viewOf(path) {
  for (const [pattern, view] of ROUTES) {
    const match = pattern.exec(path);
    if (match && isEncoded(match[1])) return [view, match[1] === undefined ? null : decodeURIComponent(match[1])];
  }
  return [showNothing, null];
}

function isEncoded(text = "") {
  try {
    return decodeURIComponent(text) !== null;
  } catch {
    return false; // "100%": an address that somebody typed
  }
}

async function showNothing(place) {
  document.title = "Nothing here - autoq";
  fill(place, el("h1", {}, "Nothing here"), el("p", {}, "No page has this address."));
}

function markCurrent() {
  for (const anchor of document.querySelectorAll(".top nav a")) {
    const isCurrent = new URL(anchor.href).pathname === location.pathname;
    if (isCurrent) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
}

let isFirst = true;

/** Screen readers go on reading at the new page's heading; nothing is moved on the first load, nor
 * away from what somebody uses by now. */
function focusHeading() {
  const isUsed = document.activeElement !== main && main.contains(document.activeElement);
  if (!isFirst && !isUsed) {
    const heading = main.querySelector("h1");
    heading?.setAttribute("tabindex", "-1");
    heading?.focus({ preventScroll: true });
  }
  isFirst = false;
}

let identity = Promise.resolve(null);

/** Ask who this is. Nobody waits for it but those who must know. */
async function learnIdentity() {
  identity = get("/v1/me").catch(() => null); // the page that is shown says why
  showIdentity(await identity);
}

function showIdentity(identity) {
  const words = identity ? `${identity.name}, may ${identity.scope}` : "";
  document.getElementById("identity").textContent = identity?.authentication ? words : "";
  document.getElementById("sign-out").hidden = !(identity?.authentication && token.get());
}

onUnauthorized((problem) => {
  shown.abort();
  shown = new AbortController();
  showSignIn(main, problem, async () => {
    await learnIdentity();
    await show();
  });
});

document.getElementById("sign-out").addEventListener("click", async () => {
  token.clear();
  await learnIdentity();
  await show();
});

setUpTheme();
setUpRoutes(() => {
  show();
  scrollTo(0, 0);
});
// Both at once: who may do what is needed only when somebody does something.
learnIdentity();
show();
