// Studies, what runs now, and a new search.

import { navigate, parameters, setParameters } from "./address.js";
import { get, queryOf } from "./api.js";
import { el, fill, link, refill, table } from "./dom.js";
import { jobTable } from "./job_view.js";
import { emptyNote, problemNote, statusBadge } from "./notes.js";
import { plural, timeText, trimmed } from "./numbers.js";
import { showSearchForm } from "./search_form.js";

const PAGE = 50;
const POLL_MILLISECONDS = 2000;
const TYPING_MILLISECONDS = 250;

/** The list of studies, or the form for a new search. */
export async function showHome(place, context) {
  if (parameters().has("new")) {
    await showSearchForm(place, context);
    return;
  }
  document.title = "Studies - autoq";
  const jobs = el("div");
  const list = new StudyList(context.signal);
  fill(
    place,
    el("div.title-row", {}, el("h1", {}, "Studies"), el("a.button.strong", { href: "/?new=1", "data-route": true }, "New search")),
    jobs,
    list.element,
  );
  watchJobs(jobs, context.signal, () => list.load()); // for as long as the page is shown
  await list.load();
}

class StudyList {
  constructor(signal) {
    this.signal = signal;
    this.chosen = new Set();
    const query = parameters();
    this.text = el("input", { type: "search", id: "study-search", placeholder: "name or model", value: query.get("q") ?? "", oninput: () => this.searchSoon() });
    this.status = el(
      "select",
      { id: "study-status", onchange: () => this.search() },
      ["", "running", "done", "failed", "interrupted", "todo"].map((name) => el("option", { value: name }, name || "any status")),
    );
    this.status.value = query.get("status") ?? "";
    this.count = el("span.quiet", { "aria-live": "polite" });
    this.compare = el("button", { type: "button", disabled: true, onclick: () => this.openComparison() }, "Compare");
    this.results = el("div");
    this.more = el("p");
    this.element = el(
      "section",
      { "aria-label": "Studies" },
      el("div.filters", {}, el("label", { for: "study-search" }, "Search"), this.text, el("label", { for: "study-status" }, "Status"), this.status, this.compare, this.count),
      this.results,
      this.more,
    );
  }

  searchSoon() {
    clearTimeout(this.typing);
    this.typing = setTimeout(() => this.search(), TYPING_MILLISECONDS);
  }

  search() {
    setParameters({ q: this.text.value.trim(), status: this.status.value });
    this.load();
  }

  async load() {
    this.current?.abort();
    this.current = new AbortController();
    this.signal.addEventListener("abort", () => this.current.abort(), { once: true });
    this.entries = [];
    await this.loadPage(null, this.current.signal);
  }

  async loadPage(cursor, signal) {
    try {
      const query = { limit: PAGE, cursor, q: this.text.value.trim(), status: this.status.value };
      const page = await get(`/v1/studies${queryOf(query)}`, { signal });
      this.entries.push(...page.items);
      this.draw(page, signal);
    } catch (error) {
      if (!signal.aborted) fill(this.results, problemNote(error));
    }
  }

  draw(page, signal) {
    this.count.textContent = plural(page.total, "study", "studies");
    refill(this.results, this.entries.length ? this.tableOfEntries() : this.nothing());
    const more = el("button", { type: "button", onclick: () => this.loadPage(page.next_cursor, signal) }, `Show more (${this.entries.length} of ${page.total})`);
    fill(this.more, page.next_cursor ? more : "");
  }

  nothing() {
    const isFiltered = this.text.value.trim() || this.status.value;
    if (isFiltered) return emptyNote("No study fits. Search for less, or for any status.");
    return emptyNote("No studies yet. ", link("/?new=1", "Start a search"), ": the bundled model takes about a minute.");
  }

  tableOfEntries() {
    const head = ["", "study", "status", { text: "bits", number: true }, "other limits", { text: "exports", number: true }, { text: "updated (UTC)", fixed: true }, "model"];
    const rows = this.entries.map((entry) => [
      this.checkbox(entry.name),
      link(`/studies/${encodeURIComponent(entry.name)}`, entry.name),
      statusBadge(entry.status),
      entry.budgets.map((bits) => trimmed(bits, 6)).join(", "),
      entry.other_budgets.join(", "),
      entry.exports || "",
      timeText(entry.updated),
      el("span.quiet", {}, entry.model),
    ]);
    return el("div.scroll", {}, table(head, rows, { caption: "Studies", kind: ".wide" }));
  }

  checkbox(name) {
    return el("input", {
      type: "checkbox",
      "aria-label": `Compare ${name}`,
      checked: this.chosen.has(name),
      onchange: (event) => {
        if (event.target.checked) this.chosen.add(name);
        else this.chosen.delete(name);
        this.compare.disabled = this.chosen.size < 2;
        this.compare.textContent = this.chosen.size < 2 ? "Compare" : `Compare ${this.chosen.size}`;
      },
    });
  }

  openComparison() {
    const query = new URLSearchParams([...this.chosen].map((name) => ["study", name]));
    navigate(`/compare?${query}`);
  }
}

/** Jobs that run or wait. Asked for again and again: a stream each would use up the browser's few
 * connections to one host. */
async function watchJobs(place, signal, onChange) {
  let shown = "";
  let known = null;
  while (!signal.aborted) {
    try {
      const active = await activeJobs(signal);
      const now = JSON.stringify(active);
      if (now !== shown) refill(place, active.length ? [el("h2", {}, "Running now"), jobTable(active)] : "");
      shown = now;
      // A job began, has its study now, or has ended: the list of studies is another.
      const jobs = active.map((job) => `${job.id} ${job.status} ${job.study}`).join();
      if (known !== null && known !== jobs) onChange();
      known = jobs;
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      fill(place, problemNote(error));
      shown = "";
    }
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? POLL_MILLISECONDS * 5 : POLL_MILLISECONDS));
  }
}

async function activeJobs(signal) {
  const pages = await Promise.all(["running", "cancelling", "queued"].map((status) => get(`/v1/jobs${queryOf({ status, limit: 20 })}`, { signal })));
  return pages.flatMap((page) => page.items);
}
