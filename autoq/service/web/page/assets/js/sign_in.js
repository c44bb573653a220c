// Where the service asks for a token.

import { get, token } from "./api.js";
import { el, fill } from "./dom.js";

/** Ask for a token; `whenDone` is called once the service takes it. */
export function showSignIn(place, problem, whenDone) {
  document.title = "Sign in - autoq";
  const input = el("input", { type: "password", id: "token", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "token-note" });
  const refused = token.get() !== null;
  const note = el("p.bad", { role: "alert" }, refused ? problem.message : "");
  const form = el(
    "form.narrow",
    { onsubmit: (event) => submit(event) },
    el("label", { for: "token" }, "Token"),
    input,
    el("p.quiet.small", { id: "token-note" }, "Kept until this tab is closed. Whoever runs the service makes one with ", el("code", {}, "autoq token create"), "."),
    note,
    el("button.strong", { type: "submit" }, "Sign in"),
  );
  async function submit(event) {
    event.preventDefault();
    token.set(input.value.trim());
    try {
      await get("/v1/me");
    } catch (error) {
      if (error.status !== 401) note.textContent = error.message; // a 401 shows this form anew
      return;
    }
    await whenDone();
  }
  fill(place, el("h1", {}, "Sign in"), el("p", {}, "This service asks for a token."), form);
  input.focus();
}
