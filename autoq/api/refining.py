"""Refining a study's plan by measured trials, in this process and in others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autoq.api._refine_confirm import Confirmed, confirm
from autoq.api._refine_data import RefineData, refine_data
from autoq.api._refine_measure import TrialMeasurer
from autoq.api._refine_sampling import MultiplierSampler, check_sampler, few_words
from autoq.api._refine_trials import read_history
from autoq.api._refine_worker import Worker, WorkOrder
from autoq.api.renewal import RenewingProgress
from autoq.api.validation import with_known_budgets
from autoq.errors import InputError
from autoq.evaluators import parse_objective
from autoq.progress import Progress, SilentProgress
from autoq.search.refine import EVERY_STRATEGY, Refinement, Source
from autoq.studies import GRACE_SECONDS, HEARTBEAT_SECONDS, PlanRecord, trial_storage

if TYPE_CHECKING:
    from optuna.study import Study as Trials

    from autoq.api.study import Study

DEFAULT_TRIALS = 100
_CONFIRMATION_WAIT_SECONDS = 600.0
BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """How a plan is refined.

    Raises:
        InputError: a value breaks its rule.
    """

    trials: int = DEFAULT_TRIALS  # plans to measure, the start included
    objective: str = "kl"  # arithmetic over metrics, to be minimised
    sampler: str = "tpe"  # of Optuna, for the trials that ask for numbers
    strategies: tuple[str, ...] = tuple(strategy.value for strategy in EVERY_STRATEGY)
    sequences: int = 32  # of calibration data that trials are measured on
    fresh_sequences: int = 64  # that the best ones are measured on
    held_out_sequences: int = 32  # to report on
    seed: int = 0
    prune: bool = True  # stop hopeless trials early
    cache_gb: float | None = None  # of quantised weights and block outputs, 10^9 bytes
    heartbeat_seconds: int = HEARTBEAT_SECONDS
    grace_seconds: int = GRACE_SECONDS

    def __post_init__(self) -> None:
        for name in ("trials", "sequences", "fresh_sequences", "held_out_sequences"):
            least = 1 if name == "trials" else 2
            if getattr(self, name) < least:
                raise InputError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.cache_gb is not None and not self.cache_gb >= 0:
            raise InputError(f"cache_gb must be >= 0, got {self.cache_gb:g}")
        parse_objective(self.objective)
        check_sampler(self.sampler)
        known = [strategy.value for strategy in EVERY_STRATEGY]
        for name in self.strategies:
            if name not in known:
                raise InputError(f"no strategy named {name!r}; known: {', '.join(known)}")

    @property
    def cache_bytes(self) -> int | None:
        """Bound on what is kept between trials; None: as much as suits the machine."""
        return None if self.cache_gb is None else int(self.cache_gb * BYTES_PER_GB)

    @property
    def suffix(self) -> str:
        """What tells this refinement of a plan from others of it, in its name."""
        plain = RefineOptions()
        parts = []
        if self.objective != plain.objective:
            parts.append(self.objective)
        if set(self.strategies) != set(plain.strategies):
            parts.append("+".join(self.strategies))
        if self.sampler != plain.sampler:
            parts.append(self.sampler)
        if self.sequences != plain.sequences:
            parts.append(f"{self.sequences} sequences")
        if not self.prune:
            parts.append("no early stopping")
        if self.seed != plain.seed:
            parts.append(f"seed {self.seed}")
        return "".join(f" · {part}" for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineResult:
    """What a refinement found."""

    study: str
    trials_study: str  # name of the Optuna study in the same store
    trials: int  # that were measured, or stopped early
    start: PlanRecord
    plan: PlanRecord  # the refined plan, or the start where nothing better was found
    verdict: Mapping[str, Any]  # of the fresh tokens, plain data

    @property
    def improved(self) -> bool:
        """Whether the plan is another than the start."""
        return self.plan.id != self.start.id

    def as_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "study": self.study,
            "trials_study": self.trials_study,
            "trials": self.trials,
            "improved": self.improved,
            "start": {"plan_id": self.start.id, "label": self.start.label},
            "plan": {"plan_id": self.plan.id, "label": self.plan.label},
            **self.verdict,
        }


def refine_study(
    study: Study,
    plan: PlanRecord,
    options: RefineOptions,
    *,
    workers: int = 1,
    holds_lease: bool = False,
    progress: Progress | None = None,
) -> RefineResult:
    """Measure plans round `plan` until the trials are spent, and keep the best if it is better.

    Trials are in the store as soon as they begin. Any number of processes on any number of
    machines that call this with equal arguments share them; one that was killed, or all, is made
    up for when the same is run again. Plans are chosen by their loss on calibration tokens. The
    best few are measured on fresh tokens; the best of those replaces the start only if it is
    significantly better there, and is then measured on held-out tokens like every plan.

    Args:
        plan: the start; not a refined one.
        workers: processes, this one included.
        holds_lease: the caller holds the study's lease; otherwise it is taken at the end.
    Raises:
        InputError: an option breaks a rule, or the start itself cannot be measured.
        ModelError: the model's folder has changed since the search.
        StudyLockedError: another process worked on the study for too long at the end.
    """
    if workers < 1:
        raise InputError(f"workers must be >= 1, got {workers}")
    progress = progress or SilentProgress()
    trials = open_trials(study, plan, options)
    data = refine_data(study, options)
    with _helpers(study, plan, options, workers, progress):
        work(study, plan, options, trials, data, progress)
    with _leased(study, holds_lease, progress) as renewing:
        confirmed = confirm(
            study, plan, _refinement(study, plan, options, 0.0), trials, data, options, renewing
        )
    return _result(study, plan, trials, confirmed)


def open_trials(study: Study, plan: PlanRecord, options: RefineOptions) -> Trials:
    """The Optuna study of this refinement, in the store's own database; made where there is none."""
    import optuna

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
            direction="minimize",
            load_if_exists=True,
        )
        trials.set_metric_names([options.objective])
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
    sampler = trials.sampler
    assert isinstance(sampler, MultiplierSampler)
    with TrialMeasurer(
        study,
        data.selection,
        parse_objective(options.objective),
        cache_bytes=options.cache_bytes,
    ) as measurer:
        noise_floor = _noise_floor(trials, measurer)
        with _trial_progress(trials, options.trials, progress) as advance:
            worker = Worker(
                trials,
                _refinement(study, plan, options, noise_floor),
                measurer,
                sampler,
                WorkOrder(trials=options.trials, prune=options.prune),
                advance=advance,
                note=progress.note,
            )
            worker.run()


def _refinement(
    study: Study, plan: PlanRecord, options: RefineOptions, noise_floor: float
) -> Refinement:
    costs = study.costs(study.rules)
    start = with_known_budgets(plan.to_plan(), costs)
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
        "autoq_study": study.name,
        "autoq_plan": plan.label,
        "budget": plan.label,
        "metric": options.objective,
        "seed": options.seed,
        "model_fingerprint": study.record.model_fingerprint,
    }


def _noise_floor(trials: Trials, measurer: TrialMeasurer) -> float:
    """Measured by the first worker; all others take its number."""
    known = trials.user_attrs.get("noise_floor")
    if known is None:
        known = measurer.noise_floor()
        trials.set_user_attr("noise_floor", known)
    return float(known)


@contextmanager
def _trial_progress(trials: Trials, wanted: int, progress: Progress) -> Iterator[Any]:
    """Counts the trials that all workers have finished."""
    with progress.task("refining", wanted) as advance:
        shown = 0

        def update() -> None:
            nonlocal shown
            done = min(read_history(trials).done, wanted)
            advance(done - shown)
            shown = done

        update()
        yield update
        update()


@contextmanager
def _leased(study: Study, holds_lease: bool, progress: Progress) -> Iterator[Progress]:
    if holds_lease:
        yield progress
        return
    with study.store.lease(study.id, wait_seconds=_CONFIRMATION_WAIT_SECONDS) as lease:
        yield RenewingProgress(progress, lease)


@contextmanager
def _helpers(
    study: Study, plan: PlanRecord, options: RefineOptions, workers: int, progress: Progress
) -> Iterator[None]:
    """The other processes; they end by themselves when there are enough trials."""
    if workers == 1:
        yield
        return
    from autoq.api._refine_process import started_helpers

    with started_helpers(study, plan, asdict(options), workers - 1, progress):
        yield


def _result(study: Study, plan: PlanRecord, trials: Trials, confirmed: Confirmed) -> RefineResult:
    return RefineResult(
        study=study.name,
        trials_study=trials.study_name,
        trials=read_history(trials).done,
        start=plan,
        plan=confirmed.plan,
        verdict=confirmed.verdict,
    )
