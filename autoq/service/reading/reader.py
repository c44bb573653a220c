"""What the service tells of studies: everything that is read, and plans, which are computed at once.

Nothing here loads torch, transformers or Optuna. All methods may be called from several threads.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from autoq.api.budgets import Budgets
from autoq.api.cache_plans import (
    KV_CACHE,
    CacheWish,
    label_with_cache,
    plan_with_cache,
    wish_of,
    with_cache,
)
from autoq.api.measured import REFINED_FROM, is_asked_for
from autoq.api.study_tables import DISCOVERY, SENSITIVITY, SOLVE
from autoq.errors import InputError, UnknownNameError
from autoq.service.pagination import decode_cursor, encode_cursor
from autoq.service.reading._cached_tables import CachedStudy, StudyCache
from autoq.service.reading._moments import finished, unchanged
from autoq.service.reading._plan_views import (
    frontier_view,
    sensitivities_view,
    solved_plan,
    stored_plan,
)
from autoq.service.reading._study_views import (
    PublicPath,
    export_entry,
    measurement_entry,
    stage_entry,
    study_entry,
    study_status,
    trial_entry,
    without_places,
)
from autoq.service.replies import not_found
from autoq.studies import (
    PlanRecord,
    StudyFilter,
    StudyMarks,
    StudyStore,
    WorkStatus,
)
from autoq.studies.listing import entries_of
from autoq.wire import (
    ExportEntry,
    Frontier,
    PlanReply,
    PlanRequest,
    Sensitivities,
    StudyDetail,
    StudyPage,
    StudyStatus,
    TrialPage,
)

CACHED_STUDIES = 8
_STUDIES, _TRIALS = "studies", "trials"


class StudyReader:
    """The studies of a store as the service shows them.

    A study that is not there, and a plan that is not the study's, are refused as "not-found"; what
    a study has not computed yet as "not-finished".
    """

    def __init__(
        self,
        store: StudyStore,
        public_path: PublicPath,
        *,
        cached_studies: int = CACHED_STUDIES,
    ) -> None:
        """
        Args:
            public_path: a path of the server's -> what clients see of it.
            cached_studies: whose tables stay in memory, those that were asked for last.
        """
        self._store = store
        self._public_path = public_path
        self._cache = StudyCache(store, most=cached_studies)

    def cache_counts(self) -> dict[str, int]:
        """How often a study's tables were at hand ("hit"), and how often not ("miss")."""
        return self._cache.counts()

    # Lists

    def studies(
        self,
        limit: int,
        cursor: str | None = None,
        *,
        status: StudyStatus | None = None,
        model: str | None = None,
        text: str | None = None,
    ) -> StudyPage:
        """A page of studies, those that were worked on last first.

        Args:
            model: as clients see it.
            text: in the study's name, its model or its architecture, whatever the case.
        Raises:
            InputError: no page of studies ever gave the cursor.
        """
        wanted = StudyFilter(
            status=None if status is None else status.value,
            models=None if model is None else self._paths_shown_as(model),
            text=text or None,
        )
        after = None if cursor is None else _study_cursor(cursor)
        found, total = self._store.study_page(wanted, limit=limit + 1, after=after)
        page, rest = found[:limit], found[limit:]
        entries = entries_of(self._store, page)
        return StudyPage(
            items=tuple(study_entry(entry, self._public_path) for entry in entries),
            total=total,
            next_cursor=encode_cursor(_STUDIES, page[-1].updated, page[-1].id) if rest else None,
        )

    def trials(self, name: str, limit: int, cursor: str | None = None) -> TrialPage:
        """A page of the trials of the study's refinements, the oldest first.

        Raises:
            InputError: no page of trials ever gave the cursor.
        """
        with not_found():
            record = self._store.study_named(name)
        after = 0 if cursor is None else decode_cursor(_TRIALS, cursor, int)[0]
        found, total = self._store.trial_page(record.name, limit=limit + 1, after=after)
        page, rest = found[:limit], found[limit:]
        return TrialPage(
            items=tuple(trial_entry(record) for record in page),
            total=total,
            next_cursor=encode_cursor(_TRIALS, page[-1].id) if rest else None,
        )

    def exports(self, name: str) -> tuple[ExportEntry, ...]:
        """The study's checkpoints, the oldest first."""
        with not_found():
            record = self._store.study_named(name)
        records = self._store.exports(record.id)
        return tuple(export_entry(entry, self._public_path) for entry in records)

    # One study

    def detail(self, name: str) -> StudyDetail:
        """Everything about a study that is no table."""
        study, marks = self._study(name)
        with unchanged(study, marks):
            return self._detail(study)

    def _detail(self, study: CachedStudy) -> StudyDetail:
        name = study.name
        record = self._store.study_named(name)
        stages = self._store.stage_times(record.id)
        done = {stage.name for stage in stages if stage.status is WorkStatus.DONE}
        discovered = DISCOVERY in done
        unit = study.finished(SENSITIVITY)["unit"] if SENSITIVITY in done else None
        plans = [plan for plan in study.plans() if is_asked_for(plan)] if unit else []
        measurements = self._store.measurements(record.id)
        labels = {plan.id: plan.label for plan in plans}
        jobs = self._store.jobs(limit=1, study=name)
        return StudyDetail(
            name=record.name,
            model=self._public_path(record.model_path),
            architecture=record.architecture,
            model_fingerprint=record.model_fingerprint,
            status=study_status(record, is_held=self._store.is_held(record.id)),
            created=record.created,
            updated=record.updated,
            configuration=without_places(record.configuration, self._public_path),
            versions=record.versions,
            stages=tuple(stage_entry(stage) for stage in stages),
            groups=len(study.model_map.groups) if discovered else None,
            formats=tuple(study.config.formats),
            excluded=tuple(
                {"name": entry.name, "reason": entry.reason, "weights": entry.weights}
                for entry in study.model_map.excluded
            )
            if discovered
            else (),
            rules=study.rules,
            target=study.target,
            unit=unit,
            plan=self._last_plan(study, unit) if unit and SOLVE in done else None,
            plans=tuple(
                stored_plan(plan, unit or "", measurements, labels, assignment=False)
                for plan in plans
            ),
            measurements=tuple(measurement_entry(entry) for entry in measurements),
            exports=self.exports(name),
            job=jobs[0].id if jobs else None,
        )

    def plan(self, name: str, plan_id: int) -> PlanReply:
        """A stored plan of the study."""
        with not_found():
            record = self._store.study_named(name)
            plan = self._store.plan(plan_id)
            if plan.study_id != record.id:
                raise UnknownNameError(f"study {name} has no plan with id {plan_id}")
        study, marks = self._study(name)
        with unchanged(study, marks):
            return self._stored(study, plan)

    def solve(self, name: str, request: PlanRequest) -> PlanReply:
        """The plan for a request: a stored one of these budgets, or one that is solved now.

        As `Study.plan`, it is refined where refinement found a better one, and has the key/value
        cache's formats where the study's last plan has. Without `keep` nothing is written.

        Raises:
            BudgetInfeasibleError, ResourceInfeasibleError, QualityInfeasibleError, InputError,
            UnknownNameError: as `Study.solve`.
        """
        study, marks = self._study(name)
        budgets = _budgets(request)
        with finished(study, marks):
            if not budgets.stated:
                return self._last_plan(study, study.finished(SENSITIVITY)["unit"])
            rules = study.rules if request.rules is None else request.rules
            wish = self._wish(study, marks)
            if request.keep:
                plan = study.solve_for(budgets, rules)
                if wish is not None:
                    plan = with_cache(study, plan, wish)
                return self._stored(study, study.refined(plan))
            return self._solved(study, budgets, rules, wish)

    def frontier(self, name: str, points: int = 64) -> Frontier:
        """The best plans for all budgets, under the rules of the study's last search."""
        study, marks = self._study(name)
        with finished(study, marks):
            reachable = study.planner(study.rules).reachable_bits
            return frontier_view(
                study.name, study.sensitivity.unit, reachable, study.frontier(points)
            )

    def sensitivities(self, name: str) -> Sensitivities:
        """The table that plans come from."""
        study, marks = self._study(name)
        with finished(study, marks):
            return sensitivities_view(study)

    def report(self, name: str) -> str:
        """The page that `autoq report` writes of the last plan, as HTML that needs nothing else."""
        from autoq.report import render_html, report_data

        study, marks = self._study(name)
        with finished(study, marks):
            summary = without_places(study.summary(), self._public_path)
            return render_html(report_data(summary, study.frontier()))

    # Inside

    def _study(self, name: str) -> tuple[CachedStudy, StudyMarks]:
        with not_found():
            return self._cache.study(name)

    def _paths_shown_as(self, model: str) -> list[str]:
        return [path for path in self._store.model_paths() if self._public_path(path) == model]

    def _wish(self, study: CachedStudy, marks: StudyMarks) -> CacheWish | None:
        """What the cache of the last plan was chosen by; None where it has none."""
        if not any(name == KV_CACHE for _, name, _, _ in marks.stages):
            return None
        last = self._store.stage(study.id, SOLVE)
        if last is None or "plan_id" not in last.payload:
            return None
        return wish_of(self._store.plan(last.payload["plan_id"]))

    def _solved(
        self, study: CachedStudy, budgets: Budgets, rules: tuple[str, ...], wish: CacheWish | None
    ) -> PlanReply:
        label = study.label_of(budgets, rules)
        if wish is not None:
            label = label_with_cache(label, wish)
        known = self._store.plan_labelled(study.id, label)
        if known is not None:
            return self._stored(study, study.refined(self._store.plan(known)))
        started = time.perf_counter()
        plan = study.as_counted(study.best(budgets, rules))
        if wish is not None:
            plan, _ = plan_with_cache(study, plan, wish)
        seconds = time.perf_counter() - started
        return solved_plan(plan, label, budgets, study.sensitivity.unit, seconds)

    def _last_plan(self, study: CachedStudy, unit: str) -> PlanReply:
        return self._stored(study, study.plan(), unit)

    def _stored(self, study: CachedStudy, plan: PlanRecord, unit: str | None = None) -> PlanReply:
        start = plan.details.get(REFINED_FROM)
        labels = {} if start is None else {start: self._store.plan(start).label}
        measurements = self._store.measurements(study.id)
        return stored_plan(plan, unit or study.finished(SENSITIVITY)["unit"], measurements, labels)


def _budgets(request: PlanRequest) -> Budgets:
    values: dict[str, Any] = request.model_dump(exclude={"rules", "keep"}, exclude_none=True)
    return Budgets(**values)


def _study_cursor(cursor: str) -> tuple[str, int]:
    updated, study_id = decode_cursor(_STUDIES, cursor, str, int)
    try:
        moment = datetime.fromisoformat(updated)
        aware = moment.tzinfo is not None
        moment.astimezone(UTC)  # as the store compares it
    except (ValueError, OverflowError):
        aware = False
    if not aware:
        raise InputError(
            "the cursor must be the next_cursor of a page of this list, as it was given; leave it "
            "out for the first page"
        )
    return updated, study_id
