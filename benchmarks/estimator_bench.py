"""One model for `estimators.py`: calibrated once, scored by any estimator, measured on any plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.api.config import ScoringConfig
from autoq.api.scoring import BatchesInMemory, ScoringPass
from autoq.api.task import load, load_data, scoring_task, token_batches
from autoq.calibration import calibrate
from autoq.formats import NONE, FormatName
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import Assignment, discover, forward_logits, output_kind
from autoq.search import CostTable, SensitivityTable, build_cost_table, solve
from autoq.search.estimators import Estimator, make_estimator
from autoq.search.objectives import divergence_of

SEQUENCE_LENGTH = 256


@dataclass
class Bench:
    """One model, calibrated once, with its held-out tokens and what was measured on them."""

    folder: str
    sequences: int
    held_out: int
    single_sequences: int
    formats: tuple[FormatName, ...]
    measured: dict[tuple[FormatName, ...], NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = ScoringConfig(formats=self.formats, calibration_sequences=self.sequences)
        self.loaded = load(self.config, self.folder)
        self.model = self.loaded.model
        self.model_map = discover(self.model)
        self.data = load_data(
            self.loaded,
            None,
            sequences=self.sequences,
            sequence_length=SEQUENCE_LENGTH,
            split="calibration",
            seed=0,
        )
        task = scoring_task(self.loaded, self.data, self.config)
        self.calibration = calibrate(
            self.model,
            self.model_map,
            self.formats,
            task.batches,
            task.run,
            run_small=task.run_small,
            container=Container.MODELOPT,
            scale_dtype=self.loaded.storage_dtype,
        )
        held_out = load_data(
            self.loaded,
            None,
            sequences=self.held_out,
            sequence_length=SEQUENCE_LENGTH,
            split="held_out",
            seed=0,
        )
        self.batches = token_batches(held_out, self.config.batch_size, self.loaded.device)
        self.simulated = SimulatedModel(
            self.model,
            self.model_map.slots,
            {},
            self.calibration,
            container=Container.MODELOPT,
            scale_dtype=self.loaded.storage_dtype,
        )
        with torch.no_grad():
            self.reference = [forward_logits(self.model, ids) for ids in self.batches]
        self.costs: CostTable = build_cost_table(self.model_map, (*self.formats, NONE))

    def score(
        self, name: str, options: Mapping[str, Any], seed: int
    ) -> tuple[SensitivityTable, Any, float]:
        """(scores, arrays beside them, CPU seconds) of one estimator's pass.

        Args:
            seed: of the labels.
        """

        def make(chosen: str) -> Estimator:
            return make_estimator(
                chosen,
                self.model,
                self.model_map,
                self.formats,
                self.calibration,
                container=Container.MODELOPT,
                scale_dtype=self.loaded.storage_dtype,
                seed=seed,
                **options,
            )

        config = ScoringConfig(formats=self.formats, estimator=name, seed=seed)
        task = scoring_task(self.loaded, self.data, config)
        started = time.process_time()
        estimator, contributions = ScoringPass(
            make=make,
            batches=len(task.batches),
            loss=task.loss,
            store=BatchesInMemory(),
            advance=lambda steps=1: None,
            note=print,
        ).run(name)
        seconds = time.process_time() - started
        return self.table(name, contributions, estimator.unit), estimator.results(), seconds

    def table(self, name: str, contributions: NDArray[Any], unit: str) -> SensitivityTable:
        """Scores as the solver takes them."""
        return SensitivityTable(
            groups=tuple(group.name for group in self.model_map.groups),
            formats=self.formats,
            contributions=contributions,
            unit=unit,
            estimator=name,
        )

    def single_divergences(self) -> NDArray[np.float64]:
        """Measured divergence of quantising one group alone, [groups, formats]."""
        found = np.full((len(self.model_map.groups), len(self.formats)), np.nan)
        batches = max(1, self.single_sequences // self.config.batch_size)
        for row, group in enumerate(self.model_map.groups):
            for column, name in enumerate(self.formats):
                if all((slot, name) in self.calibration for slot in group.slots):
                    self.simulated.apply(dict.fromkeys(group.slots, name))
                    found[row, column] = self._divergences(batches).mean()
        self.simulated.restore()
        return found

    def divergences(self, assignment: Assignment) -> NDArray[np.float64]:
        """Measured divergence of a plan on each held-out sequence; measured once."""
        key = tuple(assignment[group.name] for group in self.model_map.groups)
        if key not in self.measured:
            self.simulated.apply(slot_formats_of(self.model_map, assignment))
            self.measured[key] = self._divergences(len(self.batches))
            self.simulated.restore()
        return self.measured[key]

    @torch.no_grad()
    def _divergences(self, batches: int) -> NDArray[np.float64]:
        divergence: Callable[[Tensor, Tensor], Tensor] = divergence_of(output_kind(self.model))
        found = [
            divergence(before, forward_logits(self.model, ids)).double().mean(dim=1).numpy()
            for before, ids in zip(self.reference[:batches], self.batches[:batches], strict=True)
        ]
        return np.concatenate(found)

    def plans(self, table: SensitivityTable, budgets: Sequence[float]) -> list[Assignment]:
        """The best assignments for all budgets."""
        return [solve(table, self.costs, budget).assignment for budget in budgets]
