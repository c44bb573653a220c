// What a study is: its name, its model, how far it is; and what is done with all of it.

import { navigate } from "./address.js";
import { download, remove, studyPath } from "./api.js";
import { el, fill, link } from "./dom.js";
import { problemNote, statusBadge } from "./notes.js";
import { plural, timeText } from "./numbers.js";

/** The head of a study's page. `page` has its name, detail and scopes. */
export function studyHeader(page) {
  const { name } = page;
  const trouble = el("div");
  const report = el("button", { type: "button" }, "Download report");
  report.addEventListener("click", async () => {
    report.disabled = true;
    try {
      await download(studyPath(name, "/report"), `${name}.html`);
      fill(trouble);
    } catch (error) {
      fill(trouble, problemNote(error));
    } finally {
      report.disabled = false;
    }
  });
  page.facts = el("p.facts");
  fillFacts(page);
  return [
    el("p.way", {}, link("/", "Studies")),
    el(
      "div.title-row",
      {},
      el("h1", {}, name),
      el("div.actions", {}, el("a.button", { href: `/compare?study=${encodeURIComponent(name)}`, "data-route": true }, "Compare …"), report, deletion(page, trouble)),
    ),
    page.facts,
    trouble,
  ];
}

/** What the study is and how far it is, as its detail has it now. */
export function fillFacts({ facts, detail }) {
  const words = [
    detail.model,
    detail.architecture,
    detail.groups === null ? null : plural(detail.groups, "group"),
    detail.target ? `for ${detail.target}` : null,
    `updated ${timeText(detail.updated)} UTC`,
  ];
  fill(facts, statusBadge(detail.status), words.filter(Boolean).map((word) => el("span", {}, word)));
}

/** Deleting asks for the name: it cannot be undone. */
function deletion(page, trouble) {
  const dialog = el("dialog", { "aria-labelledby": "delete-title" });
  const typed = el("input", { type: "text", id: "delete-name", autocomplete: "off", spellcheck: "false" });
  const sure = el("button.danger", { type: "submit", disabled: true }, "Delete");
  typed.addEventListener("input", () => (sure.disabled = typed.value !== page.name));
  const act = async (event) => {
    event.preventDefault();
    dialog.close();
    try {
      await remove(studyPath(page.name));
      navigate("/");
    } catch (error) {
      fill(trouble, problemNote(error));
    }
  };
  fill(
    dialog,
    el(
      "form",
      { onsubmit: act },
      el("h2", { id: "delete-title" }, "Delete this study?"),
      el("p", {}, "Its scores, plans, measurements and trials are removed from the store. Checkpoints that were written stay where they are."),
      el("label", { for: "delete-name" }, "Type its name: ", el("code", {}, page.name)),
      typed,
      el("p.actions", {}, sure, el("button", { type: "button", onclick: () => dialog.close() }, "Keep it")),
    ),
  );
  const open = el("button.danger", { type: "button", onclick: () => dialog.showModal() }, "Delete …");
  page.needs("admin", open);
  return [open, dialog];
}
