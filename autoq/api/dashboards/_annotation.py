"""What Optuna's dashboard shows of a study beside its trials: note, plots and files."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.dashboards._files import ArtifactFiles
from autoq.api.dashboards._trials import METRIC_NAMES, PLAN, trial_rows
from autoq.api.measured import KL_DIVERGENCE
from autoq.api.study import Study
from autoq.api.summary import group_rows, summarise
from autoq.errors import InputError
from autoq.report import (
    KL_DIVERGENCE_TEXT,
    NoteFacts,
    ReportData,
    TrialRow,
    frontier_plot,
    heat_map_png,
    layers_plot,
    plan_csv,
    plan_json,
    prediction_plot,
    render_heat_map_html,
    render_html,
    report_data,
    study_note,
)
from autoq.report.numbers import loss_text
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_FRONTIER_POINTS = 24
_MOST_TRIALS_WITH_FILES = 20
_NEEDED = ("optuna_dashboard", "plotly")
_PLOTS = "dashboard:plot_data:"
_NOTE = "autoq:note_sha256"
"""Key of an Optuna study's attributes: what the note was when it was written here."""


def check_dashboard_installed() -> None:
    """Refuse where the packages of the extra `dashboard` are missing.

    Raises:
        InputError: one of them is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise InputError(
            f"the dashboard needs {names}, not installed here; run `pip install 'autoq[dashboard]'`"
        )


def annotate(study: Study, optuna_study: optuna.Study, *, artifacts: Path | None) -> None:
    """Write what the dashboard shows of an Optuna study beside its trials; again, what changed.

    Names of the objectives, a note, three plots, and files: plan, heat map and report of the study,
    and the plans of its best trials.

    Args:
        study: whose plans the trials are.
        optuna_study: its user attribute "autoq_plan" names the plan that is refined, if any.
        artifacts: folder for the files; None leaves them out.
    Raises:
        InputError: packages are missing, the study has no plan or is not finished, or the folder
            cannot be used.
        OSError: the folder cannot be written.
    """
    check_dashboard_installed()
    view = _view(study, optuna_study)
    if optuna_study.metric_names is None:
        _name_metrics(optuna_study)
    files = _study_files(view) if artifacts is not None else {}
    _write_note(optuna_study, study_note(view.data, _note_facts(view, optuna_study, tuple(files))))
    _write_plots(optuna_study, view)
    if artifacts is not None:
        attached = ArtifactFiles(optuna_study, artifacts)
        attached.put(files)
        for trial in _trials_with_files(optuna_study, attached.trials_with_files()):
            attached.put(_trial_files(study, trial), trial._trial_id)


@dataclass(frozen=True, slots=True)
class _View:
    """A study as its note, plots and files show it."""

    plan: PlanRecord
    summary: Mapping[str, Any]
    data: ReportData
    trials: tuple[FrozenTrial, ...]
    rows: tuple[TrialRow, ...]


def _view(study: Study, optuna_study: optuna.Study) -> _View:
    plan = _plan_of(study, optuna_study)
    summary = summarise(study, plan)
    trials = optuna_study.get_trials(deepcopy=False)
    return _View(
        plan=plan,
        summary=summary,
        data=report_data(summary, study.frontier(_FRONTIER_POINTS)),
        trials=tuple(trials),
        rows=tuple(trial_rows(trials)),
    )


def _plan_of(study: Study, optuna_study: optuna.Study) -> PlanRecord:
    """The refined plan, or the one that is refined; of measured plans the last one asked for."""
    label = optuna_study.user_attrs.get(PLAN)
    chosen = _result(optuna_study).get("plan_id")
    plans = study.plans()
    found = [plan for plan in plans if plan.id == chosen]
    found = found or [plan for plan in plans if plan.label == label]
    return found[-1] if found else study.plan()


def _note_facts(view: _View, optuna_study: optuna.Study, files: tuple[str, ...]) -> NoteFacts:
    sequences = {trial.user_attrs.get("sequences") for trial in view.trials}
    names = optuna_study.metric_names or [KL_DIVERGENCE_TEXT]
    return NoteFacts(
        plan_label=view.plan.label,
        objective=" and ".join(names),
        refines=optuna_study.user_attrs.get(PLAN),
        trials=view.rows,
        unfinished=len(view.trials) - len(view.rows),
        sequences=max((value for value in sequences if isinstance(value, int)), default=None),
        result=_result_text(_result(optuna_study)),
        files=files,
    )


def _result(optuna_study: optuna.Study) -> Mapping[str, Any]:
    """The refinement's verdict; empty while there is none."""
    found = optuna_study.user_attrs.get("result")
    result = json.loads(found) if isinstance(found, str) else {}
    return result if isinstance(result, Mapping) else {}


def _result_text(result: Mapping[str, Any]) -> str:
    if "accepted" not in result:
        return ""
    if result.get("kept_earlier"):
        return f"What an earlier refinement found is kept: {result['reason']}."
    if not result["accepted"]:
        return f"The start is kept: {result['reason']}."
    found = result["held_out"]
    start, refined = (loss_text(found[name]["value"]) for name in ("start", "refined"))
    objective = result.get("objective", "kl")
    aim = "" if objective in ("kl", KL_DIVERGENCE) else f" by {objective}"
    tie = ", a tie" if found.get("refined_is") == "tie" else ""
    return (
        f"A better plan was found{aim}: KL divergence {refined} on held-out tokens, where the start "
        f"has {start}{tie}."
    )


def _name_metrics(optuna_study: optuna.Study) -> None:
    names = METRIC_NAMES if len(optuna_study.directions) > 1 else METRIC_NAMES[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna still calls metric names experimental
        optuna_study.set_metric_names(list(names))


def _write_note(optuna_study: optuna.Study, note: str) -> None:
    """Write the note unless somebody has edited it: then theirs stays."""
    from optuna_dashboard import get_note, save_note

    storage, number = optuna_study._storage, optuna_study._study_id
    written = storage.get_study_system_attrs(number).get(_NOTE)
    present = get_note(optuna_study)
    if present != note and (not present or _sha256(present) == written):
        save_note(optuna_study, note)
        storage.set_study_system_attr(number, _NOTE, _sha256(note))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_plots(optuna_study: optuna.Study, view: _View) -> None:
    from optuna_dashboard import save_plotly_graph_object

    stored = optuna_study._storage.get_study_system_attrs(optuna_study._study_id)
    plots = {
        "frontier": frontier_plot(view.data, view.rows),
        "predicted-and-measured": prediction_plot(view.data, view.rows),
        "layers": layers_plot(view.data),
    }
    for name, figure in plots.items():
        if _stored_plot(stored, name) != figure.to_json():
            save_plotly_graph_object(optuna_study, figure, graph_object_id=name)


def _stored_plot(attributes: Mapping[str, Any], name: str) -> str:
    """The figure's JSON, which the dashboard keeps in numbered pieces."""
    prefix = f"{_PLOTS}{name}:"
    count = sum(key.startswith(prefix) for key in attributes)
    return "".join(str(attributes.get(f"{prefix}{index}", "")) for index in range(count))


def _study_files(view: _View) -> dict[str, bytes]:
    picture = io.BytesIO()
    heat_map_png(view.data, picture)
    groups = view.summary["groups"]
    about = {
        "study": view.data.study,
        "plan": view.plan.label,
        "effective_bits": view.data.effective_bits,
        "stored_bytes": view.data.stored_bytes,
        "predicted_loss": view.data.predicted_loss,
        "kl_divergence": view.data.measured.get("kl_divergence"),
    }
    return {
        "heat-map.png": picture.getvalue(),
        "heat-map.html": render_heat_map_html(view.data).encode(),
        "plan.csv": plan_csv(groups).encode(),
        "plan.json": plan_json(groups, about).encode(),
        "report.html": render_html(view.data).encode(),
    }


def _trials_with_files(
    optuna_study: optuna.Study, before: AbstractSet[int]
) -> Sequence[FrozenTrial]:
    """The first trial and the best ones; of several objectives those that no other beats.

    Args:
        before: ids of trials that have files already, which shall not grow old.
    """
    trials = [
        trial
        for trial in optuna_study.get_trials(deepcopy=False)
        if trial.state.name == "COMPLETE" and _assignment_of(trial)
    ]
    if len(optuna_study.directions) > 1:
        front = {trial.number for trial in optuna_study.best_trials}
        best = [trial for trial in trials if trial.number in front]
    else:
        best = sorted(trials, key=lambda trial: trial.value or 0.0)
    kept = {trial.number for trial in [*trials[:1], *best[:_MOST_TRIALS_WITH_FILES]]}
    return [trial for trial in trials if trial.number in kept or trial._trial_id in before]


def _trial_files(study: Study, trial: FrozenTrial) -> dict[str, bytes]:
    groups = group_rows(study, _assignment_of(trial))
    names = ("source", "label", "effective_bits", "stored_bytes", "predicted_loss", "kl_divergence")
    known = {name: trial.user_attrs[name] for name in names if name in trial.user_attrs}
    about = {"study": study.name, "trial": trial.number, **known}
    return {"plan.csv": plan_csv(groups).encode(), "plan.json": plan_json(groups, about).encode()}


def _assignment_of(trial: FrozenTrial) -> dict[str, str]:
    """Group -> format; nothing of trials that somebody else added."""
    plan = trial.user_attrs.get("plan")
    if not isinstance(plan, str) or "source" not in trial.user_attrs:
        return {}
    try:
        found = json.loads(plan)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
