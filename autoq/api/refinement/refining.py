"""Refining a study's plan by measured trials, in this process and in others."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.refinement._confirm import Confirmed, confirm
from autoq.api.refinement._data import RefineData, refine_data
from autoq.api.refinement._front import confirm_front
from autoq.api.refinement._metrics import AimedMetrics, check_names
from autoq.api.refinement._optuna import few_words
from autoq.api.refinement._trials import OF_PLAN, OF_STUDY, done_trials
from autoq.api.refinement._worker import Worker, WorkOrder
from autoq.api.refinement.edge import check_workers
from autoq.api.refinement.measure import AVAILABLE_SHARE, TrialMeasurer
from autoq.api.refinement.options import (
    AGAINST_BITS,
    BYTES_PER_GB,
    DEFAULT_TRIALS,
    RefineOptions,
    RefineResult,
)
from autoq.api.refinement.process import started_helpers
from autoq.api.renewal import RenewingProgress
from autoq.api.validation import with_known_budgets
from autoq.errors import AutoqError, InputError
from autoq.evaluators.cache import DEFAULT_BYTES, LogitsCache
from autoq.memory import available_bytes
from autoq.progress import Progress, SilentProgress
from autoq.search import Resource, reachable_bits
from autoq.search.refine import FrontRefinement, Refinement, Source
from autoq.studies import PlanRecord, trial_storage

if TYPE_CHECKING:
    from optuna.study import Study as Trials

    from autoq.api.study import Study

__all__ = [
    "AGAINST_BITS",
    "BYTES_PER_GB",
    "DEFAULT_TRIALS",
    "RefineOptions",
    "RefineResult",
    "open_trials",
    "refine_study",
    "work",
]

_LOOK_SECONDS = 1.0  # between counts of the trials of all workers: each reads the store
_CONFIRMATION_WAIT_SECONDS = 600.0
SHARE_OF_FREE_DISK = 0.1  # that the original's outputs may take where nobody asked for them


def refine_study(
    study: Study,
    plan: PlanRecord,
    options: RefineOptions,
    *,
    workers: int = 1,
    ray: str | None = None,
    holds_lease: bool = False,
    annotate: bool = False,
    progress: Progress | None = None,
) -> RefineResult:
    """Measure plans round `plan` until the trials are spent, and keep the best if it is better.

    Trials are in the store as soon as they begin. Any number of processes on any number of
    machines that call this with equal arguments share them; one that was killed, or all, is made
    up for when the same is run again. Plans are chosen by their loss on calibration tokens and on
    one half of every task's examples. The best few are measured on fresh tokens, and on the other
    half, beside what an earlier refinement of the plan made of it; the best of those replaces the
    start only if it is significantly better there and breaks no constraint more than the start
    does, and is then measured on held-out tokens like every plan. One that is significantly worse
    than the start on those is refused after all. Where none is accepted, what an earlier refinement
    found stays, unless it is significantly worse than the start or breaks a constraint more. Tasks with too few examples to hold any out
    confirm nothing, and that is said. Another run with more trials confirms on tokens that none
    before has used, as long as the data has some, and says when it has not.

    Args:
        plan: the start; not a refined one.
        workers: processes, this one included.
        ray: address of the Ray cluster that the others run on, or "auto"; None starts them here.
        holds_lease: the caller holds the study's lease; otherwise it is taken at the end.
        annotate: write notes, plots and files for Optuna's dashboard, where it is installed.
    Raises:
        InputError: an option breaks a rule, or the start itself cannot be measured.
        ModelError: the model's folder has changed since the search.
        StudyLockedError: another process worked on the study for too long at the end.
    """
    progress = progress or SilentProgress()
    # Refusals come before anything is in the store.
    has_folder = bool(study.record.model_path)
    check_workers(workers, has_folder=has_folder, store_url=study.store.url)
    check_names(options.aim)
    AimedMetrics(options.aim, study.loaded())
    if workers > 1:
        options = _with_shared_memory(study, options, workers)
    data = refine_data(study, options)
    trials = open_trials(study, plan, options)
    _check_tokens(trials, data)
    with _helpers(study, plan, options, workers, ray, progress):
        work(study, plan, options, trials, data, progress)
    with _leased(study, holds_lease, progress) as renewing:
        refinement = _refinement(study, plan, options, float(trials.user_attrs["noise_floor"]))
        if isinstance(refinement, Refinement):
            confirmed = confirm(study, plan, refinement, trials, data, options, renewing)
        else:
            confirmed = confirm_front(study, plan, trials, data, options, renewing)
        if annotate:
            _annotate(study, trials, renewing)
    return _result(study, plan, trials, confirmed)


def open_trials(study: Study, plan: PlanRecord, options: RefineOptions) -> Trials:
    """The Optuna study of this refinement, in the store's own database; made where there is none."""
    import optuna

    from autoq.api.refinement._sampler import MultiplierSampler

    storage = trial_storage(
        study.store.url,
        heartbeat_seconds=options.heartbeat_seconds,
        grace_seconds=options.grace_seconds,
    )
    with few_words():
        trials = optuna.create_study(
            storage=storage,
            study_name=f"{study.name} · {plan.label}{options.suffix}",
            sampler=MultiplierSampler(options.sampler, options.seed),
            directions=["minimize"] * (1 if options.against is None else 2),
            load_if_exists=True,
        )
        against = [] if options.against is None else ["effective bits"]
        trials.set_metric_names([options.objective, *against])
    known = trials.user_attrs
    for name, value in _about(study, plan, options).items():
        if name not in known:
            trials.set_user_attr(name, value)
    return trials


def work(
    study: Study,
    plan: PlanRecord,
    options: RefineOptions,
    trials: Trials,
    data: RefineData,
    progress: Progress,
) -> None:
    """Measure trials in this process until there are enough."""
    from autoq.api.refinement._sampler import MultiplierSampler

    sampler = trials.sampler
    assert isinstance(sampler, MultiplierSampler)
    with TrialMeasurer(
        study,
        data.selection,
        options.aim,
        cache_bytes=options.cache_bytes,
        outputs=_shared_outputs(study, options, progress),
    ) as measurer:
        noise_floor = _known(trials, "noise_floor", lambda: _noise_floor(measurer))
        original = _known(trials, "original", measurer.original)
        with _trial_progress(trials, options.trials, progress) as advance:
            worker = Worker(
                trials,
                _refinement(study, plan, options, noise_floor),
                measurer,
                sampler,
                WorkOrder(
                    trials=options.trials,
                    prune=options.prune,
                    against_bits=options.against is not None,
                    original=original,
                ),
                advance=advance,
                note=progress.note,
            )
            worker.run()


def _shared_outputs(study: Study, options: RefineOptions, progress: Progress) -> LogitsCache | None:
    """Where the original's outputs are kept between processes."""
    if options.outputs is not None:
        return LogitsCache(Path(options.outputs), note=progress.note)
    file = study.store.file
    if file is None:
        return None
    folder = file.with_name(f"{file.name}.outputs")
    bound = min(DEFAULT_BYTES, int(SHARE_OF_FREE_DISK * shutil.disk_usage(file.parent).free))
    return LogitsCache(folder, max_bytes=bound, note=progress.note)


def _refinement(
    study: Study, plan: PlanRecord, options: RefineOptions, noise_floor: float
) -> Refinement | FrontRefinement:
    costs = study.costs(study.rules)
    start = with_known_budgets(plan.to_plan(), costs)
    if options.against is not None:
        others = [b for b in start.budgets if b.resource is not Resource.EFFECTIVE_BITS]
        bits = reachable_bits(study.sensitivity, costs)
        return FrontRefinement(study.sensitivity, costs, bits, others, seed=options.seed)
    return Refinement(
        study.sensitivity,
        costs,
        start.budgets or start.budget_bits,
        start,
        trials=options.trials,
        seed=options.seed,
        noise_floor=noise_floor,
        strategies=[Source(name) for name in options.strategies],
    )


def _about(study: Study, plan: PlanRecord, options: RefineOptions) -> dict[str, Any]:
    """What the Optuna study says of itself."""
    return {
        OF_STUDY: study.name,
        OF_PLAN: plan.label,
        "budget": plan.label,
        "metric": options.objective,
        "seed": options.seed,
        "model_fingerprint": study.record.model_fingerprint,
    }


def _with_shared_memory(study: Study, options: RefineOptions, workers: int) -> RefineOptions:
    """Where no bound is given, the share of free memory that one process takes is divided."""
    if options.cache_gb is not None:
        return options
    share = AVAILABLE_SHARE * available_bytes(study.loaded().device) / workers
    return replace(options, cache_gb=share / BYTES_PER_GB)


def _check_tokens(trials: Trials, data: RefineData) -> None:
    """Refuse to mix losses of different tokens.

    Raises:
        InputError: the trials so far were measured on others.
    """
    found = _known(trials, "selection_sha256", lambda: data.selection.sha256)
    if found != data.selection.sha256:
        raise InputError(
            f"trials of {trials.study_name} were measured on other tokens than the calibration data "
            "gives now; restore the data, or begin another refinement with --seed or --sequences"
        )


def _known(trials: Trials, name: str, measure: Callable[[], Any]) -> Any:
    """What the first worker measures; all others take its numbers."""
    if name not in trials.user_attrs:
        trials.set_user_attr(name, measure())
    return trials.user_attrs[name]


def _noise_floor(measurer: TrialMeasurer) -> float:
    """Of the objective; of others than the divergence it is not known."""
    return measurer.noise_floor() if measurer.metrics.aim.is_divergence else 0.0


@contextmanager
def _trial_progress(trials: Trials, wanted: int, progress: Progress) -> Iterator[Any]:
    """Counts the trials that all workers have finished; every look renews a lease, too."""
    with progress.task("refining", wanted) as advance:
        shown, looked = 0, -math.inf

        def update(*, now: bool = False) -> None:
            nonlocal shown, looked
            if not now and time.monotonic() - looked < _LOOK_SECONDS:
                return
            looked = time.monotonic()
            done = min(done_trials(trials), wanted)
            advance(done - shown)
            shown = done

        update(now=True)
        yield update
        update(now=True)


@contextmanager
def _leased(study: Study, holds_lease: bool, progress: Progress) -> Iterator[Progress]:
    if holds_lease:
        yield progress
        return
    with study.store.lease(study.id, wait_seconds=_CONFIRMATION_WAIT_SECONDS) as lease:
        yield RenewingProgress(progress, lease)


@contextmanager
def _helpers(
    study: Study,
    plan: PlanRecord,
    options: RefineOptions,
    workers: int,
    ray: str | None,
    progress: Progress,
) -> Iterator[None]:
    """The other processes; they end by themselves when there are enough trials."""
    if workers == 1:
        yield
        return
    if ray is None:
        with started_helpers(study, plan, asdict(options), workers - 1, progress):
            yield
        return
    from autoq.api.distribution.ray_trials import started_tasks

    with started_tasks(ray, study, plan, asdict(options), workers - 1, progress):
        yield


def _annotate(study: Study, trials: Trials, progress: Progress) -> None:
    """What was found is stored already: a picture that cannot be drawn is only a pity."""
    from autoq.api.dashboards.dashboard import annotate, artifact_folder, check_dashboard_installed

    try:
        check_dashboard_installed()
    except InputError:
        return  # nobody here looks at a dashboard
    try:
        folder = None if study.store.file is None else artifact_folder(study.store)
        annotate(study, trials, artifacts=folder)
    except (AutoqError, OSError) as error:
        progress.note(f"the dashboard's notes were not written: {error}")


def _result(study: Study, plan: PlanRecord, trials: Trials, confirmed: Confirmed) -> RefineResult:
    return RefineResult(
        study=study.name,
        trials_study=trials.study_name,
        trials=done_trials(trials),
        start=plan,
        plan=confirmed.plan,
        verdict=confirmed.verdict,
    )
