"""Measured plans as trials of an Optuna study, and the trials of any refinement as rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from autoq.api.measured import KL_DIVERGENCE, OTHER_DATA, PER_SEQUENCE, VALIDATION
from autoq.errors import InputError
from autoq.report import Metric, TrialRow
from autoq.studies import MeasurementRecord, PlanRecord, rewrite_finished_trials

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from autoq.api.study import Study

STUDY, PLAN, MADE_BY = "autoq_study", "autoq_plan", "autoq_made_by"
"""Keys of an Optuna study's user attributes: whose trials it has, and who made it."""

MEASURED_PLANS = "measured plans"
METRIC_NAMES = ("effective bits", "KL divergence")
_OWN_ATTRIBUTES = {"plan", "label", "source", "effective_bits", KL_DIVERGENCE}
"""Of every trial that is made here."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A trial as it should be."""

    values: tuple[float, float]  # effective bits, KL divergence
    attributes: Mapping[str, Any]
    shares: Mapping[str, float]  # "share in nvfp4" -> of all searched weights, 0 to 1
    measured: datetime  # in UTC

    def is_like(self, trial: FrozenTrial) -> bool:
        """Whether the trial has these values and attributes, and counts."""
        return (
            trial.state.name == "COMPLETE"
            and tuple(trial.values) == self.values
            and trial.user_attrs == self.attributes
        )

    def as_trial(self) -> FrozenTrial:
        """The trial; shares of formats are its parameters, so that Optuna's plots have some."""
        import optuna

        whole = optuna.distributions.FloatDistribution(0.0, 1.0)
        trial = optuna.trial.create_trial(
            values=list(self.values),
            params=dict(self.shares),
            distributions=dict.fromkeys(self.shares, whole),
            user_attrs=dict(self.attributes),
        )
        trial.datetime_start = trial.datetime_complete = self.measured
        return trial


def measured_plans_study(
    study: Study,
    storage: optuna.storages.BaseStorage,
    say: Callable[[str], None] = lambda line: None,
) -> optuna.Study:
    """The Optuna study of the plans that were measured, made or brought up to date.

    Two objectives, divergence and bits: over many budgets one of them says nothing. Numbers that
    changed are changed in place, so that whatever users wrote and attached stays; a plan that is
    no longer measured on the same tokens as the others becomes a failed trial. Trials that users
    added are left alone.

    Args:
        say: told where numbers could not be changed.
    Raises:
        InputError: somebody else's Optuna study has the name.
    """
    import optuna

    name = _name(study)
    wanted = {trial.attributes["plan"]: trial for trial in _measured(study)}
    found = existing_measured_plans(study, storage)
    if found is None:
        found = optuna.create_study(
            study_name=name, storage=storage, directions=["minimize", "minimize"]
        )
        found.set_user_attr(STUDY, study.name)
        found.set_user_attr(MADE_BY, MEASURED_PLANS)
    present: dict[str, FrozenTrial] = {}
    for trial in filter(_is_ours, found.get_trials()):
        present.setdefault(trial.user_attrs["plan"], trial)
    problem = _bring_up_to_date(storage, present, wanted)
    if problem:
        say(f"{name} shows older numbers: {problem}")
    for plan, measured in wanted.items():
        if plan not in present:
            found.add_trial(measured.as_trial())
    # What was read before, the study keeps; so it is read anew.
    return optuna.load_study(study_name=name, storage=storage)


def _bring_up_to_date(
    storage: optuna.storages.BaseStorage,
    present: Mapping[str, FrozenTrial],
    wanted: Mapping[str, _Wanted],
) -> str:
    """Change the trials that are not as they should be; when one was measured may differ.

    Returns:
        Why they could not be changed; nothing where they are as they should be.
    """
    changed = {
        trial._trial_id: wanted[plan].as_trial()
        for plan, trial in present.items()
        if plan in wanted and not wanted[plan].is_like(trial)
    }
    withdrawn = [
        trial._trial_id
        for plan, trial in present.items()
        if plan not in wanted and trial.state.name == "COMPLETE"
    ]
    return rewrite_finished_trials(storage, changed, withdrawn) if changed or withdrawn else ""


def _is_ours(trial: FrozenTrial) -> bool:
    """Whether the trial is a plan that was measured here, and not one that a user added."""
    return trial.user_attrs.keys() >= _OWN_ATTRIBUTES and isinstance(trial.user_attrs["plan"], str)


def refinements(study: Study, storage: optuna.storages.BaseStorage) -> list[optuna.Study]:
    """The Optuna studies that refine plans of `study`, oldest first."""
    import optuna

    return [
        optuna.load_study(study_name=frozen.study_name, storage=storage)
        for frozen in storage.get_all_studies()
        if frozen.user_attrs.get(STUDY) == study.name
        and frozen.user_attrs.get(MADE_BY) != MEASURED_PLANS
    ]


def existing_measured_plans(
    study: Study, storage: optuna.storages.BaseStorage
) -> optuna.Study | None:
    """What `measured_plans_study` made for `study` before, as it is.

    Raises:
        InputError: somebody else's Optuna study has the name.
    """
    import optuna

    name = _name(study)
    if name not in {frozen.study_name for frozen in storage.get_all_studies()}:
        return None
    found = optuna.load_study(study_name=name, storage=storage)
    if found.user_attrs.get(MADE_BY) != MEASURED_PLANS:
        raise InputError(
            f"the Optuna study {name!r} was not made by autoq; rename or delete it, so that the "
            "dashboard can use the name"
        )
    return found


def trial_rows(trials: list[FrozenTrial]) -> list[TrialRow]:
    """The trials that were measured to their end."""
    rows = (_row(trial) for trial in trials if trial.state.name == "COMPLETE")
    return [row for row in rows if row is not None]


def _row(trial: FrozenTrial) -> TrialRow | None:
    """None where the attributes that every trial should have are missing."""
    attributes = trial.user_attrs
    measured, bits = number(attributes.get(KL_DIVERGENCE)), number(attributes.get("effective_bits"))
    if measured is None or bits is None:
        return None
    return TrialRow(
        number=trial.number,
        source=str(attributes.get("source", "")),
        label=str(attributes.get("label", "")),
        effective_bits=bits,
        predicted_loss=number(attributes.get("predicted_loss")),
        measured=Metric(
            name=KL_DIVERGENCE,
            value=measured,
            low=number(attributes.get("kl_low")),
            high=number(attributes.get("kl_high")),
        ),
    )


def number(value: Any) -> float | None:
    """`value` if it is a finite number, whatever a trial's attributes hold."""
    from autoq.report.numbers import finite

    return finite(value) if isinstance(value, int | float) else None


def _name(study: Study) -> str:
    return f"{study.name} · {MEASURED_PLANS}"


def _measured(study: Study) -> Iterator[_Wanted]:
    """One trial per assignment, those that were asked for first; all on the same tokens."""
    plans = {plan.id: plan for plan in study.plans()}
    records = _on_most_used_tokens(study)
    records.sort(key=lambda record: _source(plans[record.plan_id]) == VALIDATION)  # type: ignore[index]
    weights = _weights(study)
    seen = set()
    for record in records:
        assert record.plan_id is not None  # `_on_most_used_tokens` left the others out
        wanted = _wanted(plans[record.plan_id], record, weights)
        if wanted.attributes["plan"] not in seen:
            seen.add(wanted.attributes["plan"])
            yield wanted


def _on_most_used_tokens(study: Study) -> list[MeasurementRecord]:
    """The divergences of plans on the held-out tokens that most plans were measured on."""
    records = [
        record
        for record in study.store.measurements(study.id)
        if record.plan_id is not None
        and record.metric == KL_DIVERGENCE
        and record.value is not None
        and OTHER_DATA not in record.details
    ]
    if not records:
        return []
    (most_used, _), *_ = Counter(record.data_sha256 for record in records).most_common(1)
    return [record for record in records if record.data_sha256 == most_used]


def _weights(study: Study) -> dict[str, int]:
    """Group -> how many weights it has."""
    counts = study.costs().weights
    return {group.name: int(counts[row]) for row, group in enumerate(study.model_map.groups)}


def _shares(plan: PlanRecord, weights: Mapping[str, int]) -> dict[str, float]:
    total = sum(weights.values())
    taken: dict[str, int] = {}
    for group, fmt in plan.assignment.items():
        taken[fmt] = taken.get(fmt, 0) + weights[group]
    return {f"share in {fmt}": count / total for fmt, count in sorted(taken.items())}


def _utc(text: str) -> datetime:
    """Optuna's times are UTC and carry no zone."""
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)


def _wanted(plan: PlanRecord, record: MeasurementRecord, weights: Mapping[str, int]) -> _Wanted:
    value = record.value
    assert value is not None  # `_on_most_used_tokens` left the others out
    low, high = record.interval or (None, None)
    attributes = {
        "label": plan.label,
        "source": _source(plan),
        "effective_bits": plan.effective_bits,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        KL_DIVERGENCE: value,
        "kl_low": low,
        "kl_high": high,
        "measured_over_predicted": value / plan.predicted_loss if plan.predicted_loss else None,
        "sequences": len(record.details.get(PER_SEQUENCE) or ()),
        "plan": json.dumps(plan.assignment),
    }
    known = {name: given for name, given in attributes.items() if given is not None}
    return _Wanted(
        values=(plan.effective_bits, value),
        attributes=known,
        shares=_shares(plan, weights),
        measured=_utc(record.created),
    )


def _source(plan: PlanRecord) -> str:
    if "refinement" in plan.details:
        return "refined"
    first = plan.label.partition(" ")[0]
    return first if first in (VALIDATION, "uniform") else "asked"
