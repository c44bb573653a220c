"""From the request that a job was made of to what the command line would do.

Paths are resolved here once more: other servers on other machines may have written the request,
and what was a folder then may be a link now. `trust_remote_code` is nowhere given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoq.api import Study, open_study, search
from autoq.errors import InputError, UnknownNameError
from autoq.service.guard.roots import Roots
from autoq.service.jobs._speech import EventProgress, Speech
from autoq.service.jobs._store import TellingStore
from autoq.service.jobs._trials import TrialWatch
from autoq.service.requests import check_objective
from autoq.studies import PlanRecord
from autoq.wire import (
    ExportRequest,
    JobKind,
    MeasureRequest,
    RefineRequest,
    SearchRequest,
    VerifyRequest,
)

_AS_GIVEN = (
    "effective_bits",
    "max_gb",
    "max_active_bits",
    "max_latency_ms",
    "max_kl",
    "gpu",
    "latency_tokens",
    "formats",
    "kv_formats",
    "kv_bits",
    "kv_scope",
    "rules",
    "include",
    "exclude",
    "calibration_sequences",
    "sequence_length",
    "batch_size",
    "held_out_sequences",
    "container",
    "target",
    "dtype",
    "device",
    "max_memory",
    "calibration",
    "estimator",
    "confidence",
    "seed",
    "name",
    "measure",
    "compare_uniform",
    "refine",
)
"""Fields of a search request that `autoq.search` takes as they are; the others are paths."""

PATHS = ("model", "calibration_data", "export", "overwrite")
"""Those others, and what is said of one of them."""


class Work:
    """What every kind of job has at hand."""

    def __init__(self, order: Mapping[str, Any], speech: Speech) -> None:
        self.job: Mapping[str, Any] = order["job"]
        self.roots = Roots.from_json(order["roots"])
        self.ray: str | None = order["ray"]
        self.progress = EventProgress(speech)
        self.store = TellingStore.telling(order["store"], speech)
        self.trials = TrialWatch(self.store, speech)
        self.progress.listeners.append(self.trials.listen)

    def study(self) -> Study:
        """The study that the job works on.

        Raises:
            UnknownNameError: it is gone.
            InputError: its model or data are not where the service may read.
        """
        name = self.job["study"]
        if name is None:
            raise UnknownNameError("the job says no study; ask for it again")
        self.trials.study = name
        study = open_study(name, self.store)
        record = self.store.find(name)
        self.roots.check_study(record.model_path, record.configuration.get("calibration_data"))
        return study


def perform(order: Mapping[str, Any], speech: Speech) -> dict[str, Any]:
    """Do a job, and return its result.

    Args:
        order: what the runner says, see `autoq.service.jobs.runner`.
    Raises:
        AutoqError: as the functions of `autoq.api`.
    """
    work = Work(order, speech)
    with work.store:
        return _KINDS[JobKind(work.job["kind"])](work, work.job["request"])


def _search(work: Work, content: Mapping[str, Any]) -> dict[str, Any]:
    request = SearchRequest.model_validate(content)
    given = {name: getattr(request, name) for name in _AS_GIVEN}
    data = work.roots.data(request.calibration_data)
    export = None if request.export is None else work.roots.new_export(request.export)
    overwrite = request.overwrite or _is_own_export(work, export)
    study = search(
        work.roots.model(request.model),
        **given,
        calibration_data=None if data is None else str(data),
        export=_made(export),
        overwrite=overwrite,
        store=work.store,
        ray=_ray_for(work, request),
        workers=_workers(work) if request.refine else 1,
        progress=work.progress,
    )
    return _plan_result(work, study, study.plan())


def _refine(work: Work, content: Mapping[str, Any]) -> dict[str, Any]:
    request = RefineRequest.model_validate(content)
    _refuse_latency(request, "refining")
    check_objective(request.objective)
    study = work.study()
    found = study.refine(
        request.effective_bits,
        max_gb=request.max_gb,
        max_active_bits=request.max_active_bits,
        ray=work.ray,
        workers=_workers(work),
        annotate=True,
        progress=work.progress,
        trials=request.trials,
        objective=request.objective or "kl",
    )
    work.trials.tell_new()
    return {"study": study.name, "refinement": found.as_plain()}


def _measure(work: Work, content: Mapping[str, Any]) -> dict[str, Any]:
    request = MeasureRequest.model_validate(content)
    study = work.study()
    plan = _plan_of(study, request.plan)
    with work.store.lease(study.id) as lease:
        from autoq.api.renewal import RenewingProgress

        study.measure(plan, progress=RenewingProgress(work.progress, lease))
    return _plan_result(work, study, plan)


def _export(work: Work, content: Mapping[str, Any]) -> dict[str, Any]:
    request = ExportRequest.model_validate(content)
    study = work.study()
    limits = {
        name: value
        for name in ("effective_bits", "max_gb", "max_active_bits", "max_latency_ms", "gpu")
        if (value := getattr(request, name)) is not None
    }
    if request.plan is not None and limits:
        raise InputError("an export is of a plan or of one for budgets; give one of both")
    plan = study.plan(**limits) if request.plan is None else _plan_of(study, request.plan)
    output = work.roots.new_export(request.output)
    written = study.export(
        str(_made(output)),
        plan=plan,
        container=request.container,
        tp_size=request.tp_size,
        pp_size=request.pp_size,
        overwrite=request.overwrite or _is_own_export(work, output),
        progress=work.progress,
    )
    public = {**written, "path": work.roots.public(output)}
    return {"study": study.name, "plan": plan.id, "export": public}


def _verify(work: Work, content: Mapping[str, Any]) -> dict[str, Any]:
    from autoq.export.checkup import check_checkpoint
    from autoq.formats import parse_target

    request = VerifyRequest.model_validate(content)
    target = None if request.target is None else parse_target(request.target)
    report = check_checkpoint(work.roots.checkpoint(request.checkpoint), target)
    return {**report.as_plain(), "checkpoint": request.checkpoint}


_KINDS: Mapping[JobKind, Callable[[Work, Mapping[str, Any]], dict[str, Any]]] = {
    JobKind.SEARCH: _search,
    JobKind.REFINE: _refine,
    JobKind.MEASURE: _measure,
    JobKind.EXPORT: _export,
    JobKind.VERIFY: _verify,
}


def _ray_for(work: Work, request: SearchRequest) -> str | None:
    """The cluster that scores for a search, if one does."""
    if work.ray is not None and request.max_memory is not None:
        work.progress.note(
            "a search within a bound on memory reads the model a block at a time, on this machine "
            "and not on the cluster"
        )
        return None
    return work.ray


def _workers(work: Work) -> int:
    """How many processes measure trials: this one, and on a cluster as many as it has room for."""
    if work.ray is None:
        return 1
    from autoq.api.distribution.ray_cluster import connect, share_of

    return 1 + share_of(connect(work.ray), None).workers


def _refuse_latency(request: RefineRequest, what: str) -> None:
    """
    Raises:
        InputError: a budget is given that this cannot hold.
    """
    if request.max_latency_ms is not None or request.gpu is not None:
        raise InputError(
            f"{what} takes budgets of effective_bits, max_gb and max_active_bits; leave out "
            "max_latency_ms and gpu: where the study's last plan has them, they hold"
        )


def _plan_of(study: Study, plan_id: int) -> PlanRecord:
    """A stored plan of the study.

    Raises:
        UnknownNameError: the study has none of that id.
    """
    found = next((plan for plan in study.plans() if plan.id == plan_id), None)
    if found is None:
        known = ", ".join(str(plan.id) for plan in study.plans()[-10:]) or "none"
        raise UnknownNameError(f"study {study.name} has no plan {plan_id}; its last ones: {known}")
    return found


def _plan_result(work: Work, study: Study, plan: PlanRecord) -> dict[str, Any]:
    """What is said of a plan in a job's result; the study's own page has the rest."""
    from autoq.api.summary import summarise

    summary = summarise(study, plan)
    export = summary["export"]
    return {
        "study": study.name,
        "plan": plan.id,
        "label": plan.label,
        "effective_bits": plan.effective_bits,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        "unit": summary["unit"],
        "measured": summary["measured"],
        "export": None if export is None else {**export, "path": work.roots.public(export["path"])},
    }


def _made(folder: Path | None) -> Path | None:
    """The folder that a checkpoint's folder is to lie in, made."""
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _is_own_export(work: Work, folder: Path | None) -> bool:
    """Whether an attempt of this very job wrote the checkpoint that is there, and died then."""
    if folder is None or work.job["attempts"] <= 1 or work.job["study"] is None:
        return False
    study_id = work.store.find(work.job["study"]).id
    return any(
        export.path == str(folder) and export.started >= work.job["started"]
        for export in work.store.exports(study_id)
    )
