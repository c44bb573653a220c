"""What the store has of one search, and the model that was searched."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from autoq.api._model_map_json import model_map_from_json
from autoq.api._study_batches import stored_array, stored_contributions
from autoq.api.budgets import Budgets
from autoq.api.config import ScoringConfig
from autoq.api.costing import (
    SIZES,
    constrained_costs,
    shares_from,
    sizes_from_plain,
    study_costs,
)
from autoq.api.serialize import calibration_from_plain
from autoq.api.task import LoadedModel, load
from autoq.errors import InputError, ModelError, StoreError
from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.models import ModelMap, SlotName
from autoq.search import CostTable, SensitivityTable
from autoq.search.costs import StoredSizes
from autoq.search.interactions import Interactions
from autoq.studies import StudyRecord, StudyStore, WorkStatus

DISCOVERY, CALIBRATION, SENSITIVITY = "discovery", "calibration", "sensitivity"
SOLVE, MEASURE = "solve", "measure"
"""The stages of a study, by name in the store."""

NO_BUDGETS = Budgets()


class StudyData:
    """What the store has of one search, and the model that was searched."""

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

    @property
    def trusts_remote_code(self) -> bool:
        """Whether Python code that the model's folder brings may run."""
        return self._trust_remote_code

    @cached_property
    def config(self) -> ScoringConfig:
        """What the scores were computed with."""
        return ScoringConfig.from_json(self._record.configuration)

    @cached_property
    def model_map(self) -> ModelMap:
        """The slots and decision groups that discovery found."""
        return model_map_from_json(self.finished(DISCOVERY)["model_map"])

    @cached_property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the model's weights on disk."""
        dtype: torch.dtype = getattr(torch, self.finished(DISCOVERY)["storage_dtype"])
        return dtype

    @cached_property
    def calibration(self) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
        """The calibrated parameters of every slot in every format."""
        arrays = self._store.arrays(self.id, CALIBRATION)
        return calibration_from_plain(self.finished(CALIBRATION)["records"], arrays)

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
            with suppress(StoreError):  # it may be the store that failed; then that is said
                self._store.fail_stage(self.id, name, seconds, f"{type(error).__name__}: {error}")
            raise
        self._store.finish_stage(self.id, name, time.perf_counter() - started, payload)

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of the process that scored."""
        return int(self.finished(SENSITIVITY)["peak_rss_bytes"])

    @property
    def record(self) -> StudyRecord:
        """The study's row."""
        return self._record

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
