// Requests to the service: the token, problems, and streams of events.

const KEY = "autoq-token";

/** What the service refused, or why it could not be asked. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the server answered ${status}`);
    this.status = status;
    this.kind = String(body.type ?? "").split(":").at(-1);
    this.title = body.title ?? "";
    this.errors = Array.isArray(body.errors) ? body.errors : [];
    this.limits = body.limits ?? null;
  }
}

let whenUnauthorized = () => {};

/** What to do when a token is missing or wrong. */
export function onUnauthorized(listener) {
  whenUnauthorized = listener;
}

// The token lives as long as the tab does, and goes into no address and no cookie.
export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

function headersWith(further) {
  const known = token.get();
  return { ...(known ? { Authorization: `Bearer ${known}` } : {}), ...further };
}

async function problemOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // Something between the service and here answered; its status is all that is known.
  }
  return new Problem(response.status, body);
}

async function checked(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { title: "No answer", detail: "the server does not answer; is it still running?" });
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (problem.status === 401) whenUnauthorized(problem);
  throw problem;
}

/** GET, as JSON. */
export async function get(path, { signal } = {}) {
  return (await checked(path, { headers: headersWith({ Accept: "application/json" }), signal })).json();
}

/** GET, as text. */
export async function getText(path, { signal } = {}) {
  return (await checked(path, { headers: headersWith({}), signal })).text();
}

/** POST of JSON, answered by JSON. */
export async function post(path, body = {}, { signal, idempotencyKey } = {}) {
  const further = { "Content-Type": "application/json", Accept: "application/json" };
  if (idempotencyKey) further["Idempotency-Key"] = idempotencyKey;
  const options = { method: "POST", headers: headersWith(further), body: JSON.stringify(body), signal };
  return (await checked(path, options)).json();
}

/** DELETE. */
export async function remove(path) {
  await checked(path, { method: "DELETE", headers: headersWith({}) });
}

/** Fetch something with the token, and hand it to the browser as a file. */
export async function download(path, fallbackName) {
  const response = await checked(path, { headers: headersWith({}) });
  const named = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  saveBlob(await response.blob(), named ? named[1] : fallbackName);
}

/** Hand a blob to the browser as a file. */
export function saveBlob(blob, name) {
  const address = URL.createObjectURL(blob);
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** `/v1/studies/NAME` and what comes after it. */
export const studyPath = (name, rest = "") => `/v1/studies/${encodeURIComponent(name)}${rest}`;

/** Parameters as a query string; empty ones are left out. */
export function queryOf(parameters) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(key, value);
  }
  const text = query.toString();
  return text ? `?${text}` : "";
}

/** Keys for the jobs of one form: the same body is one job until the service has taken it. */
export class JobKey {
  constructor() {
    this.value = freshKey();
    this.body = null;
  }

  /** POST a body, answered by its job. */
  async post(path, body) {
    const text = JSON.stringify(body);
    if (this.body !== null && this.body !== text) this.value = freshKey();
    this.body = text;
    const job = await post(path, body, { idempotencyKey: this.value });
    this.value = freshKey();
    return job;
  }
}

function freshKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
