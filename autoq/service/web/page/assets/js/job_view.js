// One job as it happens: what it does, how far it is, what it says.

import { get, post } from "./api.js";
import { el, fill, link, table } from "./dom.js";
import { follow } from "./events.js";
import { problemNote, statusBadge } from "./notes.js";
import { lossText, remainingText, secondsText } from "./numbers.js";

const KINDS = { search: "Search", refine: "Refinement", measure: "Measurement", export: "Export", verify: "Check" };
const ENDED = new Set(["done", "failed", "cancelled"]);
const MOST_LOG_LINES = 2000;
const MOST_TRIALS = 500;

/** Whether nothing more happens to a job unless it is resumed. */
export const hasEnded = (job) => ENDED.has(job.status);

/** What a job is called: its kind, and what it is about. */
export function jobTitle(job) {
  const about = job.study ?? job.request?.name ?? job.request?.model ?? job.request?.checkpoint ?? "";
  return `${KINDS[job.kind] ?? job.kind}${about ? ` of ${about}` : ""}`;
}

/** A bar that says how far a task is, in words, too. */
export class ProgressBar {
  constructor() {
    this.fillBar = el("i");
    this.bar = el("div.bar", { role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, this.fillBar);
    this.name = el("span");
    this.words = el("span.quiet");
    this.element = el("div.progress", {}, el("div.progress-words", {}, this.name, this.words), this.bar);
  }

  /** @param {{task: string, done: number, total: number, seconds_left: number|null}} progress */
  show({ task, done, total, seconds_left: left }) {
    const share = total > 0 ? Math.min(done / total, 1) : null;
    this.name.textContent = task;
    const estimate = share !== 1 && typeof left === "number" ? `, about ${remainingText(left)} left` : "";
    this.words.textContent = share === null ? `${done}` : `${done} of ${total} (${Math.floor(share * 100)} %)${estimate}`;
    this.fillBar.style.width = `${(share ?? 0.05) * 100}%`;
    this.bar.setAttribute("aria-label", task);
    this.element.classList.toggle("finished", share === 1);
    if (share === null) this.bar.removeAttribute("aria-valuenow");
    else this.bar.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    return this;
  }
}

/** The whole of a job, live. `onChange` is called with the job whenever its status is another. */
export class JobView {
  constructor({ signal, compact = false, onChange = () => {} }) {
    this.signal = signal;
    this.compact = compact;
    this.onChange = onChange;
    this.bars = new Map();
    this.stages = new Map();
    this.lastEvent = 0;
    this.head = el("div.job-head");
    this.trouble = el("div");
    this.connection = el("p.quiet.small", { "aria-live": "polite" });
    this.progress = el("div.progress-list");
    this.stageList = el("ol.stages");
    this.notes = el("ul.notes");
    this.trialRows = el("tbody");
    this.log = el("pre.log", { tabindex: 0, "aria-label": "Log" });
    this.element = el("div.job");
  }

  /** Show a job and follow it until it has ended. */
  start(job) {
    this.job = job;
    this.compose();
    this.update(job);
    if (this.compact && hasEnded(job)) return;
    this.listen();
  }

  compose() {
    const parts = [this.head, this.trouble, this.connection, this.progress];
    if (!this.compact) {
      parts.push(
        this.part("Stages", this.stageList),
        this.part("Notes", this.notes),
        (this.trialPart = this.part("Trials", this.trialTable())),
        this.part("Log", this.log),
      );
      this.trialPart.hidden = true;
    }
    fill(this.element, parts);
  }

  part(title, content) {
    return el("section", { "aria-label": title }, el("h2", {}, title), content);
  }

  trialTable() {
    const head = [["trial", "number"], ["state", ""], ["measured", "number"]];
    const titles = head.map(([title, kind]) => el("th", { scope: "col", class: kind || null }, title));
    return el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Trials" }, el("table", {}, el("thead", {}, el("tr", {}, titles)), this.trialRows));
  }

  listen() {
    if (this.isListening) return;
    this.isListening = true;
    let isFirst = true;
    follow(`/v1/jobs/${encodeURIComponent(this.job.id)}/events`, {
      signal: this.signal,
      after: this.lastEvent, // of a job that is resumed nothing is told twice
      onEvent: (event) => this.take(event),
      isOver: () => hasEnded(this.job),
      onConnection: (isThere) => {
        if (!isThere) this.connection.textContent = "The connection is lost; trying again. Nothing of the job is lost by that.";
        else if (isFirst) this.sayWaiting();
        else this.refresh(); // an event before the connection was lost may have found no answer
        isFirst = false;
      },
    })
      .catch((problem) => fill(this.trouble, problemNote(problem)))
      .finally(() => (this.isListening = false));
  }

  /** What an event says. */
  take({ id, kind, data }) {
    this.lastEvent = id;
    const takers = {
      status: () => this.refresh(),
      progress: () => this.takeProgress(data),
      stage: () => this.takeStage(data),
      note: () => this.takeNote(data),
      trial: () => this.takeTrial(data),
      log: () => this.takeLog(data),
    };
    takers[kind]?.();
  }

  async refresh() {
    // Several events in a row ask once: the job as it is now answers all of them.
    if (this.asking) return;
    this.asking = true;
    try {
      await new Promise((resolve) => setTimeout(resolve, 80));
      this.asking = false;
      this.update(await get(`/v1/jobs/${encodeURIComponent(this.job.id)}`, { signal: this.signal }));
    } catch (error) {
      this.asking = false;
      if (!this.signal.aborted) fill(this.trouble, problemNote(error));
    }
  }

  update(job) {
    const isNews = this.job.status !== job.status || this.job.study !== job.study;
    this.job = job;
    if (job.progress && this.bars.size === 0) this.takeProgress(job.progress);
    fill(this.trouble, job.problem ? problemNote({ title: job.problem.title, message: job.problem.detail }) : "");
    fill(this.head, this.headline());
    this.sayWaiting();
    this.element.classList.toggle("ended", hasEnded(job));
    if (isNews) this.onChange(job);
  }

  /** Why nothing moves yet, or any more. */
  sayWaiting() {
    const words = { queued: "Waits for a worker that is free.", running: this.bars.size ? "" : "Starting …", cancelling: "Ending …" };
    this.connection.textContent = words[this.job.status] ?? "";
  }

  headline() {
    const { job } = this;
    const title = this.compact ? link(`/jobs/${encodeURIComponent(job.id)}`, jobTitle(job)) : null;
    const study = job.study && !this.compact ? link(`/studies/${encodeURIComponent(job.study)}`, `Study ${job.study}`) : null;
    return [title, statusBadge(job.status), this.duration(), study, el("span.actions", {}, this.action("cancel"), this.action("resume"))];
  }

  duration() {
    const { job } = this;
    if (!job.started) return null;
    const end = job.finished ? new Date(job.finished) : null;
    const words = end ? `took ${secondsText((end - new Date(job.started)) / 1000)}` : `since ${new Date(job.started).toISOString().slice(11, 19)} UTC`;
    const again = job.attempts > 1 ? `, attempt ${job.attempts}` : "";
    return el("span.quiet", {}, words + again);
  }

  action(name) {
    const { job } = this;
    const fits = name === "cancel" ? !hasEnded(job) && job.status !== "cancelling" : ["failed", "cancelled"].includes(job.status);
    if (!fits) return null;
    return el("button", { type: "button", onclick: (event) => this.act(name, event.currentTarget) }, name === "cancel" ? "Cancel" : "Resume");
  }

  async act(name, button) {
    button.disabled = true;
    try {
      const wasEnded = hasEnded(this.job);
      this.update(await post(`/v1/jobs/${encodeURIComponent(this.job.id)}/${name}`));
      if (wasEnded) this.listen(); // its stream had ended, or was never asked for
    } catch (error) {
      button.disabled = false;
      fill(this.trouble, problemNote(error));
    }
  }

  takeProgress(progress) {
    let bar = this.bars.get(progress.task);
    if (!bar) {
      bar = new ProgressBar();
      this.bars.set(progress.task, bar);
      this.progress.append(bar.element);
      this.sayWaiting();
    }
    bar.show(progress);
    if (this.compact) for (const [task, other] of this.bars) other.element.hidden = task !== progress.task;
  }

  takeStage({ name, status, seconds }) {
    let entry = this.stages.get(name);
    if (!entry) {
      entry = el("li");
      this.stages.set(name, entry);
      this.stageList.append(entry);
    }
    fill(entry, statusBadge(status), el("span", {}, String(name).replaceAll("_", " ")), el("span.quiet", {}, typeof seconds === "number" ? secondsText(seconds) : ""));
  }

  takeNote({ text }) {
    this.notes.append(el("li", {}, text));
  }

  takeTrial({ number, state, values }) {
    if (this.trialPart) this.trialPart.hidden = false;
    const cells = [[number, "number"], [state, null], [(values ?? []).map(lossText).join(", "), "number"]];
    this.trialRows.prepend(el("tr", {}, cells.map(([text, kind]) => el("td", { class: kind }, text))));
    if (this.trialRows.childElementCount > MOST_TRIALS) this.trialRows.lastElementChild.remove();
  }

  takeLog({ text, stream }) {
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 30;
    this.log.append(el("span", { class: stream === "stderr" ? "stderr" : null }, String(text).endsWith("\n") ? text : `${text}\n`));
    if (this.log.childElementCount > MOST_LOG_LINES) this.log.firstElementChild.remove();
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}

/** A few lines for each of several jobs. */
export function jobTable(jobs) {
  const rows = jobs.map((job) => [
    link(`/jobs/${encodeURIComponent(job.id)}`, jobTitle(job)),
    statusBadge(job.status),
    job.progress && !hasEnded(job) ? new ProgressBar().show(job.progress).element : job.problem ? job.problem.title : "",
  ]);
  return table(["job", "status", { text: "" }], rows, { caption: "Jobs", kind: ".wide.jobs" });
}
