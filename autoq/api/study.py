"""A study: everything one search found, and what can be done with it without scoring again."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoq.api.config import ScoringConfig, parse_container
from autoq.api.measured import VALIDATION
from autoq.api.renewal import RenewingProgress
from autoq.api.serialize import calibration_from_plain, model_map_from_json
from autoq.api.task import (
    LoadedModel,
    load,
)
from autoq.errors import InputError, ModelError
from autoq.evaluators import Fidelity
from autoq.export import check_destination
from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import ModelMap, SlotName
from autoq.progress import Progress, SilentProgress
from autoq.search import (
    CostTable,
    Plan,
    SensitivityTable,
    apply_rules,
    build_cost_table,
    frontier,
    parse_rule,
    solve,
    uniform_plan,
)
from autoq.studies import PlanRecord, StudyRecord, StudyStore, WorkStatus

DISCOVERY, CALIBRATION, SENSITIVITY = "discovery", "calibration", "sensitivity"
SOLVE, MEASURE = "solve", "measure"
"""The stages of a study, by name in the store."""


class Study:
    """One search in a study store."""

    def __init__(
        self,
        store: StudyStore,
        record: StudyRecord,
        loaded: LoadedModel | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._store = store
        self._trust_remote_code = trust_remote_code
        self._record = record
        self._loaded = loaded

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

    @cached_property
    def config(self) -> ScoringConfig:
        """What the scores were computed with."""
        return ScoringConfig.from_json(self._record.configuration)

    @cached_property
    def model_map(self) -> ModelMap:
        """The slots and decision groups that discovery found."""
        return model_map_from_json(self._finished(DISCOVERY)["model_map"])

    @cached_property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the model's weights on disk."""
        dtype: torch.dtype = getattr(torch, self._finished(DISCOVERY)["storage_dtype"])
        return dtype

    @cached_property
    def calibration(self) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
        """The calibrated parameters of every slot in every format."""
        arrays = self._store.arrays(self.id, CALIBRATION)
        return calibration_from_plain(self._finished(CALIBRATION)["records"], arrays)

    @cached_property
    def sensitivity(self) -> SensitivityTable:
        """Groups x formats -> expected loss increase."""
        return self.sensitivity_from(self._finished(SENSITIVITY))

    def sensitivity_from(self, payload: Mapping[str, Any]) -> SensitivityTable:
        """The table of the stored batches, before or after its stage is finished."""
        batches = self._store.score_batches(self.id)
        return SensitivityTable(
            groups=tuple(group.name for group in self.model_map.groups),
            formats=tuple(FormatName(name) for name in payload["formats"]),
            contributions=np.concatenate([batches[index] for index in sorted(batches)]),
            unit=payload["unit"],
            estimator=payload["estimator"],
        )

    def costs(self, rules: Sequence[str] = ()) -> CostTable:
        """Groups x formats -> bits, with the user's rules applied."""
        unusable = {
            (entry["group"], entry["format"]): entry["reason"]
            for entry in self._finished(DISCOVERY)["inexpressible"]
        }
        return constrained_costs(self.model_map, self.config.formats, rules, unusable)

    def loaded(self) -> LoadedModel:
        """The original model; read from its folder when it is first needed.

        Raises:
            ModelError: the folder does not hold the model that was searched.
        """
        if self._loaded is None:
            if not self._record.model_path:
                raise ModelError(
                    f"study {self.name} was made from a model in memory; measuring and exporting "
                    "need it again: call autoq.search with the model"
                )
            # A store may come from somebody else: it cannot grant trust.
            config = replace(self.config, trust_remote_code=self._trust_remote_code)
            loaded = load(config, self._record.model_path)
            if loaded.fingerprint != self._record.model_fingerprint:
                raise ModelError(
                    f"{self._record.model_path} has changed since study {self.name} was made "
                    "(fingerprints differ); search it again"
                )
            self._loaded = loaded
        return self._loaded

    # Plans

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

    def plans(self) -> list[PlanRecord]:
        """Every plan that was solved, oldest first."""
        return self._store.plans(self.id)

    def solve(self, effective_bits: float, *, rules: Sequence[str] = ()) -> PlanRecord:
        """The best plan within a budget; solved once, then read from the store.

        Raises:
            BudgetInfeasibleError: no assignment fits; names floor and ceiling.
            InputError: a rule matches nothing or forbids everything.
        """
        label = _plan_label(effective_bits, rules)
        return self._stored_plan(label) or self._add_plan(
            label, solve(self.sensitivity, self.costs(rules), effective_bits)
        )

    def uniform(self, fmt: FormatName) -> PlanRecord:
        """Every group in one format, or in the nearest larger one that it can take."""
        label = f"uniform {fmt}"
        return self._stored_plan(label) or self._add_plan(
            label, uniform_plan(self.sensitivity, self.costs(), fmt)
        )

    def frontier(self, points: int = 64) -> list[Plan]:
        """Plans for all budgets at once, by rising bits, under the study's rules."""
        return frontier(self.sensitivity, self.costs(self.rules), points=points)

    def plan(self, effective_bits: float | None = None) -> PlanRecord:
        """The plan for a budget under the study's rules, or the one that was asked for last.

        Raises:
            InputError: no plan was solved yet and no budget is given.
        """
        if effective_bits is not None:
            return self.solve(effective_bits, rules=self.rules)
        return self._store.plan(self._finished(SOLVE)["plan_id"])

    def _stored_plan(self, label: str) -> PlanRecord | None:
        return next((plan for plan in self.plans() if plan.label == label), None)

    def _add_plan(self, label: str, plan: Plan) -> PlanRecord:
        return self._store.plan(self._store.add_plan(self.id, plan, label=label))

    # Measuring

    def simulate(self, plan: PlanRecord, *, keep_originals: bool = True) -> SimulatedModel:
        """Put the plan's formats into the loaded model, in place."""
        return SimulatedModel(
            self.loaded().model,
            self.model_map.slots,
            slot_formats_of(self.model_map, _assignment(plan)),
            self.calibration,
            container=self.config.container,
            scale_dtype=self.storage_dtype,
            keep_originals=keep_originals,
        )

    def measure(
        self,
        plan: PlanRecord,
        *,
        data: str | None = None,
        sequences: int = 32,
        progress: Progress | None = None,
    ) -> Fidelity:
        """Measure a plan on held-out tokens and store what was found.

        Args:
            data: where the tokens come from; None is the held-out part of the calibration data.
                Of another source everything may be used.
            sequences: how many held-out sequences.
        """
        from autoq.api.measuring import held_out_tokens, measure_plan

        tokens = held_out_tokens(self, data, sequences=sequences)
        return measure_plan(self, plan, tokens, data=data, progress=progress)

    def validate(
        self,
        *,
        random: int = 40,
        near: int = 40,
        sequences: int = 32,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Measure random and near-optimal plans and judge the predicted losses by them.

        The arguments, the result and the errors are those of `autoq.api.validation.validate`.
        """
        from autoq.api.validation import validate

        return validate(
            self, random=random, near=near, sequences=sequences, seed=seed, progress=progress
        )

    @property
    def validation(self) -> dict[str, Any] | None:
        """What the last validation found; None before the first."""
        found = self._store.stage(self.id, VALIDATION)
        return found.payload if found and found.status is WorkStatus.DONE else None

    # Exporting

    def export(
        self,
        destination: str | Path,
        *,
        effective_bits: float | None = None,
        container: str | None = None,
        overwrite: bool = False,
        check_logits: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write the checkpoint of a plan, read it back, and record it.

        Args:
            effective_bits: another budget than the last plan's; needs no pass over data.
            container: "modelopt" or "compressed-tensors"; None is the one searched for.
            check_logits: load a compressed-tensors checkpoint with transformers, too, and compare
                its logits with the simulation's; takes the memory of two more models.
        Raises:
            ExportError: the container cannot express the plan, or the folder cannot be written.
            VerificationError: what was written does not read back bit for bit.
            StudyLockedError: another process works on the study.
        """
        from autoq.api.exporting import export_plan

        chosen = parse_container(container) if container else self.config.container
        plan = self.plan(effective_bits)
        check_destination(Path(destination), self._record.model_path or None, overwrite=overwrite)
        with self._store.lease(self.id) as lease:
            return export_plan(
                self,
                plan,
                Path(destination),
                chosen,
                overwrite=overwrite,
                check_logits=check_logits,
                progress=RenewingProgress(progress or SilentProgress(), lease),
            )

    @contextmanager
    def repeated_stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A stage that every budget runs anew; what is put into the payload is stored with it."""
        payload: dict[str, Any] = {}
        started = time.perf_counter()
        self._store.reset_stage(self.id, name)
        self._store.begin_stage(self.id, name)
        try:
            yield payload
        except BaseException as error:
            seconds = time.perf_counter() - started
            self._store.fail_stage(self.id, name, seconds, f"{type(error).__name__}: {error}")
            raise
        self._store.finish_stage(self.id, name, time.perf_counter() - started, payload)

    # Looking

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of the process that scored."""
        return int(self._finished(SENSITIVITY)["peak_rss_bytes"])

    def summary(self, effective_bits: float | None = None) -> dict[str, Any]:
        """Everything about one plan as plain data; the keys are documented in the README."""
        from autoq.api.summary import summarise

        return summarise(self, self.plan(effective_bits))

    @property
    def record(self) -> StudyRecord:
        """The study's row."""
        return self._record

    def _finished(self, stage: str) -> dict[str, Any]:
        found = self._store.stage(self.id, stage)
        if found is None or found.status is not WorkStatus.DONE:
            raise InputError(
                f"study {self.name} has not finished its {stage}; run the same search again and "
                "it continues where it stopped"
            )
        return found.payload


def constrained_costs(
    model_map: ModelMap,
    formats: Sequence[FormatName],
    rules: Sequence[str],
    unusable: Mapping[tuple[Any, Any], str],
) -> CostTable:
    """Costs of every group in every format, with what is not allowed marked.

    Args:
        rules: the user's, "pattern=format[,format]".
        unusable: group and format -> why the container cannot hold it.
    """
    costs = build_cost_table(model_map, formats)
    allowed = costs.allowed.copy()
    for row, group in enumerate(costs.groups):
        for column, fmt in enumerate(costs.formats):
            allowed[row, column] &= (group, fmt) not in unusable
    parsed = [parse_rule(rule) for rule in rules]
    return apply_rules(replace(costs, allowed=allowed), model_map, parsed)


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux getrusage also counts the process that started this one.
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plan_label(effective_bits: float, rules: Sequence[str]) -> str:
    # All digits: plans are found by their label, and a wider budget's plan may not fit this one.
    bits = f"{effective_bits:g}"
    label = f"{bits if float(bits) == effective_bits else repr(effective_bits)} bits"
    return f"{label}, rules {'; '.join(rules)}" if rules else label


def _assignment(plan: PlanRecord) -> Mapping[Any, FormatName]:
    return {group: FormatName(fmt) for group, fmt in plan.assignment.items()}
