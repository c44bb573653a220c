"""What the store has of one search, read without the model: tables, plans, and what follows.

Neither torch nor transformers is loaded here, so whoever only looks at studies is quick and small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from autoq.api._model_map_json import model_map_from_json
from autoq.api._study_batches import stored_array, stored_contributions
from autoq.api.budgets import Budgets, required_budgets
from autoq.api.cache_plans import plan_of_weights, wish_of, with_cache
from autoq.api.config import ScoringConfig
from autoq.api.costing import (
    SIZES,
    constrained_costs,
    shares_from,
    sizes_from_plain,
    study_costs,
)
from autoq.api.measured import VALIDATION
from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import ModelMap, SlotName
from autoq.search import (
    CostTable,
    Plan,
    Planner,
    Resource,
    SensitivityTable,
    uniform_plan,
)
from autoq.search.costs import StoredSizes
from autoq.search.interactions import Interactions
from autoq.studies import PlanRecord, StudyRecord, StudyStore, WorkStatus

DISCOVERY, CALIBRATION, SENSITIVITY = "discovery", "calibration", "sensitivity"
SOLVE, MEASURE = "solve", "measure"
"""The stages of a study, by name in the store."""

NO_BUDGETS = Budgets()


class StudyTables:
    """What the store has of one search, and the plans that follow from it."""

    def __init__(self, store: StudyStore, record: StudyRecord) -> None:
        self._store = store
        self._record = record

    @property
    def name(self) -> str:
        """The study's name in the store."""
        return self._record.name

    @property
    def store(self) -> StudyStore:
        """Where the study is kept."""
        return self._store

    @property
    def id(self) -> int:
        """The study's number in the store."""
        return self._record.id

    @property
    def record(self) -> StudyRecord:
        """The study's row."""
        return self._record

    @cached_property
    def config(self) -> ScoringConfig:
        """What the scores were computed with."""
        return ScoringConfig.from_json(self._record.configuration)

    @cached_property
    def model_map(self) -> ModelMap:
        """The slots and decision groups that discovery found."""
        return model_map_from_json(self.finished(DISCOVERY)["model_map"])

    @cached_property
    def sensitivity(self) -> SensitivityTable:
        """Groups x formats -> expected loss increase."""
        return self.sensitivity_from(self.finished(SENSITIVITY))

    @cached_property
    def interactions(self) -> Interactions | None:
        """What every two cells do together; None where the estimator keeps no such terms."""
        gram = stored_array(self._store, self.id, SENSITIVITY, "interactions")
        if gram is None:
            return None
        table = self.sensitivity
        return Interactions(groups=table.groups, formats=table.formats, gram=gram)

    def sensitivity_from(self, payload: Mapping[str, Any]) -> SensitivityTable:
        """The table of what scoring stored, before or after its stage is finished."""
        return SensitivityTable(
            groups=tuple(group.name for group in self.model_map.groups),
            formats=tuple(FormatName(name) for name in payload["formats"]),
            contributions=stored_contributions(self._store, self.id, SENSITIVITY),
            unit=payload["unit"],
            estimator=payload["estimator"],
        )

    @property
    def stored_sizes(self) -> StoredSizes | None:
        """What the container writes; None for studies of versions that did not count it."""
        found = self._store.stage(self.id, SIZES)
        return sizes_from_plain(found.payload) if found and found.payload else None

    @property
    def token_shares(self) -> Mapping[SlotName, float] | None:
        """How many of the tokens each slot sees; None where calibration did not count them."""
        return shares_from(self.model_map, self.finished(CALIBRATION))

    def costs(self, rules: Sequence[str] = (), budgets: Budgets = NO_BUDGETS) -> CostTable:
        """Groups x formats -> what they take of each resource, with the user's rules applied.

        Args:
            budgets: name the hardware whose latency is predicted, if any.
        Raises:
            InputError: a rule cannot be used, or a resource that is limited was not counted.
        """
        unusable = {
            (entry["group"], entry["format"]): entry["reason"]
            for entry in self.finished(DISCOVERY)["inexpressible"]
        }
        costs = constrained_costs(self.model_map, self.config.formats, rules, unusable)
        return study_costs(
            self, costs, budgets, needed=[budget.resource for budget in budgets.limits]
        )

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that the last search was given; they bind other budgets, too."""
        solved = self._store.stage(self.id, SOLVE)
        return tuple(solved.payload.get("rules", ())) if solved else ()

    @property
    def target(self) -> str | None:
        """Where the last search's checkpoint is to run, for example "vllm:h200"."""
        solved = self._store.stage(self.id, SOLVE)
        return solved.payload.get("target") if solved else None

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of the process that scored."""
        return int(self.finished(SENSITIVITY)["peak_rss_bytes"])

    def finished(self, stage: str) -> dict[str, Any]:
        """What a stage stored as plain data.

        Raises:
            InputError: the study has not finished it.
        """
        found = self._store.stage(self.id, stage)
        if found is None or found.status is not WorkStatus.DONE:
            raise InputError(
                f"study {self.name} has not finished its {stage}; run the same search again and "
                "it continues where it stopped"
            )
        return found.payload

    # Plans

    def plans(self) -> list[PlanRecord]:
        """Every plan that was solved, oldest first."""
        return self._store.plans(self.id)

    def solve(
        self, effective_bits: float | None = None, *, rules: Sequence[str] = (), **limits: Any
    ) -> PlanRecord:
        """The best plan within budgets; solved once, then read from the store.

        Args:
            effective_bits: mean bits per searched weight.
            rules: "pattern=format[,format]", binding the groups that match.
            limits: other fields of `autoq.api.budgets.Budgets`: max_gb, max_active_bits,
                max_latency_ms with gpu or latency_table, and max_kl, which here limits the
                predicted divergence; `autoq.search` limits the measured one.
        Raises:
            BudgetInfeasibleError: no assignment fits; names floor and ceiling.
            ResourceInfeasibleError: another budget, or all together, cannot be met.
            QualityInfeasibleError: no plan is predicted to lose so little; names the least.
            InputError: a rule matches nothing or forbids everything, or no budget is given.
        """
        return self.solve_for(Budgets(effective_bits=effective_bits, **limits), rules)

    def solve_for(self, budgets: Budgets, rules: Sequence[str] = ()) -> PlanRecord:
        """As `solve`, for budgets in one value."""
        label = self.label_of(budgets, rules)
        return self._stored_plan(label) or self.add_plan(label, self.best(budgets, rules), budgets)

    def label_of(self, budgets: Budgets, rules: Sequence[str] = ()) -> str:
        """What the plan for budgets is called.

        Raises:
            InputError: no budget is stated, or the scores predict no divergence to limit.
        """
        label = required_budgets(budgets).label(rules)
        if budgets.max_kl is None:
            return label
        if self.sensitivity.unit != "nats_per_token":
            raise InputError(
                f"estimator {self.sensitivity.estimator} predicts no divergence to limit; search "
                "with the default estimator, or measure plans"
            )
        return f"{label}, predicted"

    def best(self, budgets: Budgets, rules: Sequence[str] = ()) -> Plan:
        """The best plan within budgets, solved now and not stored; the errors are those of `solve`."""
        if budgets.max_kl is not None:
            return self.smallest(budgets, rules, budgets.max_kl)
        return self.planner(rules, budgets).solve(budgets.limits)

    def planner(self, rules: Sequence[str] = (), budgets: Budgets = NO_BUDGETS) -> Planner:
        """What solves for budgets under rules; the arguments are those of `costs`."""
        return Planner(self.sensitivity, self.costs(rules, budgets))

    def smallest(self, budgets: Budgets, rules: Sequence[str], loss_limit: float) -> Plan:
        """The plan of fewest effective bits whose predicted loss is no more than `loss_limit`.

        Raises:
            QualityInfeasibleError: no plan within the budgets is predicted to lose so little.
        """
        return self.planner(rules, budgets).smallest(loss_limit, budgets=budgets.limits)

    def most_faithful(self, budgets: Budgets, rules: Sequence[str]) -> Plan:
        """The plan of least predicted loss within the budgets, whatever its size."""
        planner = self.planner(rules, budgets)
        _, most_bits = planner.reachable_bits
        return planner.solve(budgets.limits or most_bits)

    def add_plan(
        self,
        label: str,
        plan: Plan,
        budgets: Budgets = NO_BUDGETS,
        *,
        details: Mapping[str, Any] | None = None,
    ) -> PlanRecord:
        """Store a plan; the same plan under the same label is stored once.

        Args:
            details: plain data to keep beside what the budgets say.
        """
        plan = self.as_counted(plan)
        kept = {**budgets.details(), **(details or {})}
        return self._store.plan(self._store.add_plan(self.id, plan, label=label, details=kept))

    def as_counted(self, plan: Plan) -> Plan:
        """The plan with what it takes of the resources that the study counted."""
        if self.stored_sizes is not None:
            return plan
        # What is not searched was not counted.
        counted: dict[Resource, float] = {
            k: v for k, v in plan.takes.items() if k is not Resource.STORED_BYTES
        }
        return replace(plan, takes=counted)

    def uniform(self, fmt: FormatName) -> PlanRecord:
        """Every group in one format, or in the nearest larger one that it can take."""
        label = f"uniform {fmt}"
        return self._stored_plan(label) or self.add_plan(
            label, uniform_plan(self.sensitivity, self.costs(), fmt)
        )

    def frontier(self, points: int = 64, *, max_gb: float | None = None) -> list[Plan]:
        """Plans for all budgets at once, by rising bits, under the study's rules.

        Args:
            max_gb: leave out plans whose checkpoint is larger, in 10^9 bytes.
        """
        budgets = Budgets(max_gb=max_gb)
        plans = self.planner(self.rules, budgets).frontier(points=points)
        limits = {budget.resource: budget.limit for budget in budgets.limits}
        return [
            plan
            for plan in plans
            if all(plan.takes[resource] <= limit for resource, limit in limits.items())
        ]

    def plan(self, effective_bits: float | None = None, **limits: Any) -> PlanRecord:
        """The plan for budgets under the study's rules, or the one that was asked for last.

        Where that one chose the key/value cache's formats, so does the plan, by the same wish.
        Where it was refined, it is the refined plan. The arguments are those of `solve`.

        Raises:
            InputError: no plan was solved yet and no budget is given.
        """
        return self.refined(self.unrefined_plan(effective_bits, **limits))

    def unrefined_plan(self, effective_bits: float | None = None, **limits: Any) -> PlanRecord:
        """As `plan`, of least predicted loss, whatever refinement has found."""
        budgets = Budgets(effective_bits=effective_bits, **limits)
        last = self._store.stage(self.id, SOLVE)
        if not budgets.stated or last is None or "plan_id" not in last.payload:
            if budgets.stated:
                return self.solve_for(budgets, self.rules)
            return self._store.plan(self.finished(SOLVE)["plan_id"])
        wish = wish_of(self._store.plan(last.payload["plan_id"]))
        plan = self.solve_for(budgets, self.rules)
        return plan if wish is None else with_cache(self, plan, wish)

    def refined(self, plan: PlanRecord) -> PlanRecord:
        """What the last refinement made of a plan; the plan itself where none did better.

        Refinement is of weights: a plan's choice of the key/value cache stands on top of it.
        """
        wish = wish_of(plan)
        if wish is not None:
            weights = plan_of_weights(self, plan)
            better = self.refined(weights)
            return plan if better.id == weights.id else with_cache(self, better, wish)
        stage = self._store.stage(self.id, refined_stage(plan))
        if stage is None or "plan_id" not in stage.payload:
            return plan
        return self._store.plan(stage.payload["plan_id"])

    def _stored_plan(self, label: str) -> PlanRecord | None:
        found = self._store.plan_labelled(self.id, label)
        return None if found is None else self._store.plan(found)

    # Looking

    @property
    def validation(self) -> dict[str, Any] | None:
        """What the last validation found; None before the first."""
        found = self._store.stage(self.id, VALIDATION)
        return found.payload if found and found.status is WorkStatus.DONE else None

    def summary(self, effective_bits: float | None = None, **limits: Any) -> dict[str, Any]:
        """Everything about one plan as plain data; the keys are documented in the README.

        The arguments are those of `solve`; with none it is the plan that was asked for last.
        """
        from autoq.api.summary import summarise

        return summarise(self, self.plan(effective_bits, **limits))


def refined_stage(start: PlanRecord) -> str:
    """Name of the stage that says what refinement made of a plan."""
    return f"refined plan {start.id}"
