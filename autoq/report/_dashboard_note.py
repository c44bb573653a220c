"""The note that a study has in Optuna's dashboard, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoq.formats import NONE
from autoq.report._data import ReportData
from autoq.report._metric import Metric
from autoq.report._trials import TrialRow, source_text
from autoq.report.numbers import (
    bits_text,
    bytes_text,
    count_text,
    interval_text,
    loss_text,
    unit_text,
)
from autoq.report.resources import budgets_text

KL_DIVERGENCE_TEXT = "KL divergence"
_SHOWN_TRIALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteFacts:
    """What a note says beside the report's data."""

    plan_label: str  # of the plan that the data is of
    objective: str  # what Optuna minimises, by name
    refines: str | None  # the plan that trials of a refinement begin with; None of measured plans
    trials: tuple[TrialRow, ...]
    unfinished: int  # trials that were stopped early, failed, wait or run
    sequences: int | None  # that every trial was measured on
    result: str  # the verdict of the refinement, in words; empty while there is none
    files: tuple[str, ...]  # names of the artifacts


def study_note(data: ReportData, facts: NoteFacts) -> str:
    """The note: what was searched, what was found, how to read numbers, plots and files."""
    parts = [
        f"# {escaped(data.study)}",
        _opening(data, facts),
        _table(("", ""), _facts(data, facts)),
        *_best(facts),
        _reading(data, facts),
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` as one line that Markdown shows as it is, in tables too."""
    for mark in "\\`*_[]<>|~#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _opening(data: ReportData, facts: NoteFacts) -> str:
    groups = f"{len(data.groups)} groups of layers"
    weights = f"{count_text(sum(group.weights for group in data.groups))} searched weights"
    what = "Every trial is a plan that was measured"
    where = "held-out text"
    if facts.refines is not None:
        label = escaped(facts.refines)
        what = f"Refinement of the plan *{label}*: every trial is another plan within its budget"
        where = "calibration text"
    return (
        f"{what}, that is, a number format for each of {groups} ({weights}). A plan is measured by "
        f"running the quantised model on {where} beside the original."
    )


def _facts(data: ReportData, facts: NoteFacts) -> Iterable[tuple[str, str]]:
    yield "model", escaped(data.model)
    yield "formats", ", ".join(escaped(name) for name in data.formats if name != NONE)
    yield "budget", budgets_text(data)
    size = f"{bits_text(data.effective_bits)} effective bits per weight, "
    size += f"{bytes_text(data.stored_bytes)} for the searched layers"
    yield f"plan *{escaped(facts.plan_label)}*", size
    low, high = data.predicted_loss_interval
    predicted = f"{loss_text(data.predicted_loss)} {unit_text(data.unit)}"
    yield "its predicted loss", f"{predicted} (95 %: {interval_text(low, high)})"
    measured = _measured(data, facts)
    yield "measured", f"{_metric(measured)}, held-out text" if measured else "not yet"
    if data.noise_floor is not None:
        yield "noise floor", _metric(data.noise_floor)
    yield "trials", _counted(facts)
    if facts.result:
        yield "**result**", f"**{escaped(facts.result)}**"


def _measured(data: ReportData, facts: NoteFacts) -> Metric | None:
    rows = [row for row in data.measurements if row.label == facts.plan_label]
    return rows[-1].metric("kl_divergence") if rows else None


def _metric(metric: Metric) -> str:
    text = f"KL divergence {loss_text(metric.value)} nats per token"
    if metric.low is None or metric.high is None:
        return text
    return f"{text} (95 %: {interval_text(metric.low, metric.high)})"


def _counted(facts: NoteFacts) -> str:
    text = f"{len(facts.trials)} measured"
    if facts.sequences is not None:
        text += f", each on the same {facts.sequences} sequences"
    return f"{text}; {facts.unfinished} stopped early or not finished" if facts.unfinished else text


def _best(facts: NoteFacts) -> Iterable[str]:
    """The best trials of one budget; over many budgets the largest plan is always the best."""
    if facts.refines is None or not facts.trials:
        return
    best = sorted(facts.trials, key=lambda trial: trial.measured.value)[:_SHOWN_TRIALS]
    rows = [
        (
            str(trial.number),
            source_text(trial.source),
            bits_text(trial.effective_bits),
            loss_text(trial.predicted_loss),
            loss_text(trial.measured.value),
            interval_text(trial.measured.low, trial.measured.high),
        )
        for trial in best
    ]
    head = ("trial", "where it comes from", "bits", "predicted", "measured KL", "95 %")
    yield "## Best trials\n\n" + _table(head, rows)
    yield (
        "The best of many is flattered by chance: a plan counts as better only when it wins again "
        "on tokens that no trial was chosen by."
    )


def _reading(data: ReportData, facts: NoteFacts) -> str:
    lines = "\n".join(f"- {line}" for line in _reading_lines(data, facts))
    return f"## How to read it\n\n{lines}"


def _reading_lines(data: ReportData, facts: NoteFacts) -> Iterable[str]:
    if facts.objective != KL_DIVERGENCE_TEXT:
        yield f"Optuna minimises `{facts.objective}`."
    yield (
        "**KL divergence** is in nats per token: 0 means the original's predictions, lower is "
        "better."
    )
    yield (
        "Plans whose 95 % intervals (`kl_low` to `kl_high`) overlap widely may be ties; "
        "differences below the noise floor, which rounding alone causes, always are."
    )
    yield (
        "`effective_bits` counts codes and block scales per weight, `stored_bytes` all that is "
        "written for the searched layers."
    )
    yield _gap(data)
    yield "`source` says why the plan was measured, `plan` has every group's format as JSON."
    yield (
        "**Plots** are on the study's first page: loss against bits, predicted against measured, and each "
        "layer's loss in each format, where rings show what the plan takes."
    )
    if facts.files:
        names = ", ".join(f"`{name}`" for name in facts.files)
        yield f"**Artifacts** of the study: {names}; trials have their own plan."
    yield (
        "Deleting the study here deletes what Optuna keeps. The search, its plans and "
        "measurements stay in autoq's own tables."
    )


def _gap(data: ReportData) -> str:
    if data.unit != "nats_per_token":
        return "`predicted_loss` only ranks plans: its estimator does not predict divergence."
    return (
        "`measured_over_predicted` is the gap to the prediction: 1 is exact, above 1 the plan "
        "loses more than the scores say."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
