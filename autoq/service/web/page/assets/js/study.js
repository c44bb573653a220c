// The page of one study: its frontier, a budget, the plan for it, and what that rests on.

import { navigate, parameters } from "./address.js";
import { Problem, download, get, post, queryOf, saveBlob, studyPath } from "./api.js";
import { BudgetControl } from "./budget.js";
import { Chart, MARKER, frontierFigure } from "./charts.js";
import { NONE_BITS } from "./colours.js";
import { announce, el, fill, link, section, table } from "./dom.js";
import { HeatMap } from "./heat_map.js";
import { Latest } from "./latest.js";
import { JobView, hasEnded } from "./job_view.js";
import { emptyNote, problemNote } from "./notes.js";
import { bitsText, gigabytesText, intervalText, lossText, percentText, trimmed, unitText } from "./numbers.js";
import { MoveList, bytesOf, moves, movesSentence, planTiles } from "./plan_view.js";
import { FurtherLimits } from "./further_limits.js";
import { PlanStrip } from "./strip.js";
import { Reference } from "./reference.js";
import { fillFacts, studyHeader } from "./study_header.js";
import { StudyTabs } from "./study_tabs.js";
import { onThemeChange } from "./theme.js";

const NO_PLAN = "There is no plan yet. It appears here when the search has found one.";
const NOT_YET = new Set(["not-finished", "not-found"]);

/** Show a study, at the budget that the address names. */
export async function showStudy(place, context) {
  document.title = `${context.name} - autoq`;
  // The name is known already: it is on the screen before anything is fetched.
  fill(place, el("h1", {}, context.name), el("p.quiet", {}, "Reading the study …"));
  const page = new StudyPage(place, context);
  await page.load();
}

class StudyPage {
  constructor(place, { name, signal, identity }) {
    Object.assign(this, { place, name, signal, identity });
    this.jobPlace = el("div");
    this.trouble = el("div");
    this.forms = {}; // of tabs: what is typed there stays when a tab is drawn again
  }

  async load() {
    this.limits = new FurtherLimits(() => this.askAgain());
    const asked = budgetOfAddress();
    // All at once; the tables of a study that is not done yet are not there.
    const frontier = this.orNothing(get(studyPath(this.name, `/frontier${queryOf({ points: 64 })}`), { signal: this.signal }));
    frontier.catch(() => {}); // looked at below, when everything else is on the screen
    const known = get(studyPath(this.name), { signal: this.signal });
    const [detail, plan, sensitivity] = await Promise.all([
      known.catch((error) => this.showBefore(error)),
      this.orNothing(post(studyPath(this.name, "/plans"), { ...asked, ...this.limits.body() }, { signal: this.signal })),
      this.orNothing(get(studyPath(this.name, "/sensitivity"), { signal: this.signal })),
    ]);
    if (!detail) return;
    Object.assign(this, { detail, sensitivity, frontier: null });
    this.compose(plan);
    await Promise.all([this.watchNewestJob(), this.takeFrontier(frontier)]);
  }

  /** The job that is to begin the study, as long as there is nothing of the study but its name. */
  async showBefore(error) {
    if (error.status !== 404) throw error;
    const { items } = await get(`/v1/jobs${queryOf({ study: this.name, limit: 1 })}`, { signal: this.signal });
    if (!items.length || items[0].status === "done") throw error;
    fill(this.place, el("p.way", {}, link("/", "Studies")), el("h1", {}, this.name), this.jobPlace, this.trouble, emptyNote(NO_PLAN));
    await this.followJob(items[0]);
    return null;
  }

  /** A reply, or nothing where the study has not got that far or no plan meets the address's limits. */
  async orNothing(reply) {
    try {
      return await reply;
    } catch (error) {
      if (!(error instanceof Problem) || error.status === 401 || error.status >= 500 || error.status === 0) throw error;
      if (!NOT_YET.has(error.kind)) fill(this.trouble, problemNote(error));
      return null;
    }
  }

  compose(plan) {
    const hasTables = this.sensitivity && (plan ?? this.detail.plan);
    const header = studyHeader(this);
    this.tabs = new StudyTabs(this);
    if (!hasTables) {
      const words = emptyNote(NO_PLAN);
      fill(this.place, header, this.jobPlace, this.trouble, words, this.tabs.element);
      return;
    }
    this.plan = plan ?? this.detail.plan;
    this.composePlan(header);
    this.takePlan(this.plan);
    this.drawToWidth();
    onThemeChange(() => this.drawToWidth(true), this.signal);
    const observer = new ResizeObserver(() => this.drawToWidth());
    observer.observe(this.place);
    this.signal.addEventListener("abort", () => observer.disconnect());
    // Behind the frame that shows it: what benchmarks/page.py waits for.
    requestAnimationFrame(() => setTimeout(() => performance.mark("autoq-heat-map")));
  }

  /** The frontier is many plans: it comes when the one plan and the table are there to be looked at. */
  async takeFrontier(coming) {
    this.frontier = await coming;
    if (!this.frontier || !this.budget) return;
    this.budget.setRanges(this.ranges());
    fill(this.chartPlace, this.chart.element, this.frontierTable());
    // The charting library is large: it comes once the rest has been painted.
    requestAnimationFrame(() => setTimeout(() => this.chart.draw()));
  }

  composePlan(header) {
    this.budget = new BudgetControl(this.ranges(), this.startValues(), (body, isSettled) => this.ask(body, isSettled));
    this.latest = new Latest(
      (body, signal) => post(studyPath(this.name, "/plans"), body, { signal }),
      (reply) => this.takePlan(reply),
      (problem) => this.refuse(problem),
      this.signal,
    );
    this.tiles = el("div.tiles");
    this.budgetTrouble = el("div");
    this.reference = new Reference(this, () => this.showMoves());
    this.moveList = new MoveList();
    this.strip = new PlanStrip(this.sensitivity);
    this.heatMap = new HeatMap(this.sensitivity);
    this.chart = this.frontierChart();
    this.chartPlace = el("div", {}, el("div.chart.waiting", {}, el("p.quiet", {}, "Reading the frontier …")));
    fill(
      this.place,
      header,
      this.jobPlace,
      this.trouble,
      this.budget.element,
      el("section.budget-panel", { "aria-label": "The plan for the budget" }, this.budgetTrouble, this.tiles, this.actions(), this.limits.element),
      section("Chosen plan by layer", el("p.quiet", {}, "A column per block; numbers are bits per weight. A bar above a cell: more bits than in the plan compared with; below: fewer."), this.strip.element, this.reference.element, this.moveList.element),
      section("Loss against bits", this.chartPlace),
      section("Sensitivity by layer and format", el("p.quiet", {}, "A row per block, a column per format. Marked: what the plan takes; without a mark a layer stays as it is, and loses nothing. Struck out: the layer cannot take the format. Point at a cell, or move with the arrow keys, for its numbers."), this.heatMap.element),
      this.tabs.element,
    );
  }

  /** What the slider reaches: as the frontier says, and until that is there as the table does. */
  ranges() {
    const [unsearched, all] = [this.plan.takes?.stored_bytes - this.plan.stored_bytes, this.plan.takes?.stored_bytes];
    if (!this.frontier) {
      const { bits, bytes } = reachOf(this.sensitivity);
      return { bits, gb: all === undefined ? null : bytes.map((value) => (value + unsearched) / 1e9) };
    }
    const bytes = this.frontier.points.map((point) => this.bytesOfPoint(point)).filter((value) => value !== null);
    const gb = bytes.length > 1 ? [Math.ceil(Math.min(...bytes)) / 1e9, Math.ceil(Math.max(...bytes)) / 1e9] : null;
    return { bits: [this.frontier.budget_floor, this.frontier.budget_ceiling], gb };
  }

  /** All weights of the checkpoint; what is not searched is as large in every plan. */
  bytesOfPoint(point) {
    if (point.takes?.stored_bytes !== undefined) return point.takes.stored_bytes;
    const all = this.plan.takes?.stored_bytes;
    return all === undefined ? null : all - this.plan.stored_bytes + point.stored_bytes;
  }

  startValues() {
    const { budgets, takes, effective_bits: bits } = this.plan;
    return { bits: budgets.effective_bits ?? bits, gb: takes?.stored_bytes === undefined ? null : takes.stored_bytes / 1e9 };
  }

  frontierChart() {
    const make = (colours) => frontierFigure({ frontier: this.frontier, plan: this.plan, stored: this.detail.plans, measured: this.measuredPoints(), unit: unitText(this.frontier.unit) }, colours);
    const label = "Predicted loss of the best plan for each budget, against its bits. The table below says the same.";
    return new Chart({ label, make, signal: this.signal, onClick: (point) => this.budget.set(point.x) });
  }

  measuredPoints() {
    const plans = new Map(this.detail.plans.map((plan) => [plan.id, plan]));
    return this.detail.measurements
      .filter((one) => one.metric === "kl_divergence" && one.value > 0 && plans.has(one.plan))
      .map((one) => ({ ...one, effective_bits: plans.get(one.plan).effective_bits }));
  }

  frontierTable() {
    const choose = (point) => el("button.plain", { type: "button", "aria-label": `Choose ${bitsText(point.effective_bits)} bits`, onclick: () => this.budget.set(point.budget ?? point.effective_bits) }, "choose");
    const rows = this.frontier.points.map((point) => [bitsText(point.effective_bits), gigabytesText(this.bytesOfPoint(point)), lossText(point.predicted_loss), intervalText(...point.predicted_loss_interval), percentText(point.gap), choose(point)]);
    const head = ["effective bits", "on disk", "predicted loss", "95 %", "gap"].map((text) => ({ text, number: true }));
    return el("details", {}, el("summary", {}, "As a table"), el("div.scroll.tall", { tabindex: 0, role: "region", "aria-label": "Frontier as a table" }, table([...head, ""], rows, { caption: "The best plan for each budget" })));
  }

  actions() {
    this.said = el("span.quiet", { role: "status" });
    const button = (text, act, scope) => {
      const made = el("button", { type: "button", onclick: () => this.act(made, act) }, text);
      if (scope) this.needs(scope, made);
      return made;
    };
    return el(
      "div.actions.panel-actions",
      {},
      button("Keep this plan", () => this.keep(), "run"),
      button("Measure", () => this.measure(), "run"),
      button("Refine …", () => this.tabs.open("trials", "#refine-trials"), "run"),
      button("Export …", () => this.tabs.open("exports", "#export-form input"), "run"),
      button("Download plan", () => this.downloadPlan()),
      this.said,
    );
  }

  /** A button stays off for who may only look. */
  async needs(scope, button) {
    const rank = ["read", "run", "admin"];
    const identity = await this.identity();
    if (identity && rank.indexOf(identity.scope) < rank.indexOf(scope)) {
      button.disabled = true;
      button.title = `needs a token that may ${scope}`;
    }
  }

  /** Do something once, and say what came of it. */
  async act(button, action) {
    button.disabled = true;
    try {
      this.said.textContent = (await action()) ?? "";
      fill(this.budgetTrouble);
    } catch (error) {
      fill(this.budgetTrouble, problemNote(error));
    } finally {
      button.disabled = false;
    }
  }

  /** Store the plan of now; what is stored already is not stored twice.
   * @returns {Promise<object>} the stored plan */
  async stored() {
    if (this.plan.id !== null) return this.plan;
    const kept = await post(studyPath(this.name, "/plans"), { ...this.budget.body(), ...this.limits.body(), keep: true });
    this.takePlan(kept);
    await this.renew();
    return kept;
  }

  async keep() {
    const wasThere = this.plan.id !== null;
    const plan = await this.stored();
    return `${wasThere ? "Kept already" : "Kept"} as plan ${plan.id}.`;
  }

  async measure() {
    const plan = await this.stored();
    await this.followJob(await post(studyPath(this.name, "/measurements"), { plan: plan.id }));
    return "";
  }

  downloadPlan() {
    if (this.plan.id !== null) return download(studyPath(this.name, `/plans/${this.plan.id}/download`), `${this.name}-plan-${this.plan.id}.json`);
    saveBlob(new Blob([JSON.stringify(this.plan, null, 2)], { type: "application/json" }), `${this.name}-${trimmed(this.plan.effective_bits, 6)}-bits.json`);
    return null;
  }

  ask(body, isSettled) {
    if (!this.isMoving) this.reference.remember(this.plan);
    this.isMoving = !isSettled;
    this.latest.want({ ...body, ...this.limits.body() });
  }

  askAgain() {
    if (this.budget) this.ask(this.budget.body(), true);
  }

  refuse(problem) {
    fill(this.budgetTrouble, problemNote(problem));
  }

  takePlan(plan) {
    this.plan = plan;
    this.budget.learn({ bits: plan.budgets.effective_bits ?? plan.effective_bits, gb: plan.takes?.stored_bytes === undefined ? null : bytesOf(plan) / 1e9 });
    fill(this.budgetTrouble);
    this.said.textContent = "";
    fill(this.tiles, planTiles(plan));
    this.heatMap.choose(plan.assignment);
    this.chart.move(MARKER, [plan.effective_bits], [plan.predicted_loss], [`${bitsText(plan.effective_bits)} bits<br>predicted ${lossText(plan.predicted_loss)}`]);
    this.showMoves();
    performance.mark("autoq-plan");
  }

  showMoves() {
    const { label, assignment } = this.reference.current();
    const moved = moves(this.sensitivity.groups, this.plan.assignment, assignment, (index, format) => this.strip.bits(index, format));
    this.strip.show(this.plan.assignment, assignment);
    this.moveList.show(moved, label);
    announce(`${trimmed(this.plan.effective_bits, 4)} bits, ${gigabytesText(bytesOf(this.plan))}, predicted loss ${lossText(this.plan.predicted_loss)}. ${movesSentence(moved)}`);
  }

  drawToWidth(isForced = false) {
    const style = getComputedStyle(this.place);
    const width = this.place.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (width === this.width && !isForced) return;
    this.width = width;
    this.strip.draw(width);
    this.heatMap.draw(width);
  }

  async watchNewestJob() {
    if (!this.detail.job) return;
    const job = await this.orNothing(get(`/v1/jobs/${encodeURIComponent(this.detail.job)}`, { signal: this.signal }));
    if (job && job.status !== "done") await this.followJob(job); // one that failed can be resumed here
  }

  /** Show a job of this study while it runs; what it leaves is read when it has ended. */
  async followJob(job) {
    this.jobSignal?.abort();
    this.jobSignal = new AbortController();
    const view = new JobView({
      signal: AbortSignal.any([this.signal, this.jobSignal.signal]),
      compact: true,
      onChange: (now) => this.takeJob(now),
    });
    fill(this.jobPlace, el("section.live", { "aria-label": "Newest job" }, view.element));
    view.start(job);
  }

  /** A search may go on with a study that has another name; what has ended has left something. */
  takeJob(job) {
    const name = this.detail?.name ?? this.name;
    if (job.study && job.study !== name) navigate(`/studies/${encodeURIComponent(job.study)}`);
    else if (hasEnded(job)) this.renew().catch((error) => this.signal.aborted || fill(this.trouble, problemNote(error)));
  }

  /** Read again what jobs change. */
  async renew() {
    if (!this.budget) {
      await this.load();
      return;
    }
    this.detail = await get(studyPath(this.name), { signal: this.signal });
    fillFacts(this);
    await this.renewPlan();
    this.tabs.renew();
    this.reference.renew();
    if (this.frontier) this.chart.draw();
  }

  /** The study's plan, where no other was asked for; what is known by now of one that is stored. */
  async renewPlan() {
    const before = this.plan;
    const isOwn = !this.budget.isAsked && this.detail.plan;
    if (!isOwn && before.id === null) return this.showMoves();
    const plan = isOwn ? this.detail.plan : await get(studyPath(this.name, `/plans/${before.id}`), { signal: this.signal });
    if (this.plan === before) this.takePlan(plan);
    return null;
  }

  /** A stored plan takes the place of the one for the budget. */
  async showStored(id) {
    this.reference.remember(this.plan);
    const plan = await get(studyPath(this.name, `/plans/${id}`), { signal: this.signal });
    const bits = plan.budgets.effective_bits;
    if (bits !== undefined && Object.keys(plan.budgets).length === 1) this.budget.set(bits);
    else this.takePlan(plan);
    scrollTo({ top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }
}

/** Least and most bits and bytes of the searched layers, each group for itself. */
function reachOf({ groups, effective_bits: rows }) {
  const total = groups.reduce((sum, group) => sum + group.weights, 0);
  const ends = [Math.min, Math.max].map((pick) => groups.reduce((sum, group, index) => sum + group.weights * pick(NONE_BITS, ...rows[index].filter((value) => value !== null)), 0));
  return { bits: ends.map((bits) => bits / total), bytes: ends.map((bits) => bits / 8) };
}

function budgetOfAddress() {
  const query = parameters();
  const [bits, gb] = [Number(query.get("bits")), Number(query.get("gb"))];
  if (query.has("gb") && gb > 0) return { max_gb: gb };
  return bits > 0 ? { effective_bits: bits } : {};
}

