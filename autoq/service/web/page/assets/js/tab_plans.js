// Plans that are kept.

import { download, studyPath } from "./api.js";
import { el, table } from "./dom.js";
import { emptyNote } from "./notes.js";
import { bitsText, budgetsText, bytesText, intervalText, lossText, percentText } from "./numbers.js";

export function plansTab(page) {
  const { plans } = page.detail;
  if (!plans.length) return emptyNote("No plan is stored yet.");
  const head = [{ text: "plan", number: true }, "what it is", "budget", { text: "bits", number: true }, { text: "searched layers", number: true }, { text: "predicted loss", number: true }, { text: "95 %", number: true }, { text: "gap", number: true }, ""];
  const rows = plans.map((plan) => [
    plan.id,
    plan.label + (plan.refined_from ? `, refined from ${plan.refined_from}` : ""),
    budgetsText(plan.budgets),
    bitsText(plan.effective_bits),
    bytesText(plan.stored_bytes),
    lossText(plan.predicted_loss),
    intervalText(...plan.predicted_loss_interval),
    percentText(plan.gap),
    actions(page, plan),
  ]);
  return el("div.scroll", {}, table(head, rows, { caption: "Stored plans", kind: ".wide" }));
}

function actions(page, plan) {
  return el(
    "span.actions",
    {},
    page.budget ? el("button.plain", { type: "button", "aria-label": `Show plan ${plan.id}`, onclick: () => page.showStored(plan.id) }, "show") : null,
    el("button.plain", { type: "button", "aria-label": `Download plan ${plan.id}`, onclick: () => download(studyPath(page.name, `/plans/${plan.id}/download`), `${page.name}-plan-${plan.id}.json`) }, "download"),
  );
}
