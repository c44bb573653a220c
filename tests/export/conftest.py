"""Tiny models with a plan and its calibration, ready to be exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoq.export import ExportResult, export_checkpoint, refusals
from autoq.formats import NONE, FormatName
from autoq.kernels import int4
from autoq.layers import Container, LayerCalibration
from autoq.models import DecisionGroup, ModelMap, SlotName, discover, load_model
from autoq.models.weights import slot_weight
from autoq.testing.tiny_models import write_tiny_model

CYCLE = tuple(FormatName(name) for name in ("fp8", "nvfp4", "w4a8_awq", "none"))
STORAGE_DTYPE = torch.bfloat16
INPUT_AMAX = 3.7

Calibrations = dict[tuple[SlotName, FormatName], LayerCalibration]


@dataclass(frozen=True)
class Tiny:
    """A tiny model, loaded from its folder."""

    source: Path
    model: nn.Module
    model_map: ModelMap

    def weight_amax(self, fmt: FormatName, fused: tuple[SlotName, ...]) -> float:
        return max(self._amax(fmt, slot_weight(self.model, self.model_map.slots[s])) for s in fused)

    def _amax(self, fmt: FormatName, weight: Tensor) -> float:
        if fmt == "w4a8_awq":
            scale = int4.group_scale(weight, storage_dtype=STORAGE_DTYPE)
            weight = int4.dequantize(int4.quantize(weight, scale))
        return weight.float().abs().max().item()

    def calibrate(self, slot_formats: Mapping[SlotName, FormatName]) -> Calibrations:
        """Maximum calibration of every quantised slot, without AWQ scales."""
        found: Calibrations = {}
        for group in self.model_map.groups:
            for slot in group.slots:
                fmt = slot_formats.get(slot, NONE)
                fused = next((s for s in group.fusion_sets if slot in s), (slot,))
                if fmt != NONE:
                    amax = self.weight_amax(fmt, fused)
                    found[slot, fmt] = LayerCalibration(weight_amax=amax, input_amax=INPUT_AMAX)
        return found


@dataclass(frozen=True)
class Planned:
    """A tiny model with a plan for one container."""

    tiny: Tiny
    container: Container
    slot_formats: Mapping[SlotName, FormatName]
    calibration: Calibrations

    def export(self, destination: Path, **changes: object) -> ExportResult:
        arguments: dict[str, object] = {
            "source": self.tiny.source,
            "destination": destination,
            "container": self.container,
            "scale_dtype": STORAGE_DTYPE,
        }
        return export_checkpoint(
            self.tiny.model,
            self.tiny.model_map,
            self.slot_formats,
            self.calibration,
            **{**arguments, **changes},
        )

    def expected(self) -> tuple[object, ...]:
        """What `verify_checkpoint` wants beside the path."""
        return (
            self.tiny.model,
            self.tiny.model_map,
            self.slot_formats,
            self.calibration,
            self.container,
            STORAGE_DTYPE,
        )

    def refusals(self) -> list[str]:
        return refusals(
            self.tiny.model,
            self.tiny.model_map,
            self.slot_formats,
            self.calibration,
            self.container,
        )

    def with_formats(self, slot_formats: Mapping[SlotName, FormatName]) -> Planned:
        calibration = self.tiny.calibrate(slot_formats)
        return replace(self, slot_formats=slot_formats, calibration=calibration)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Architecture name -> its tiny model, made once."""
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            source = write_tiny_model(name, tmp_path_factory.mktemp(name) / "model")
            model = load_model(source)
            made[name] = Tiny(source, model, discover(model))
        return made[name]

    return make


@pytest.fixture
def mixed_plan(tiny: Callable[[str], Tiny]) -> Callable[[str, Container], Planned]:
    """All formats in turn, a group each, skipping those that the container cannot hold."""

    def make(name: str, container: Container) -> Planned:
        chosen: dict[SlotName, FormatName] = {}
        loaded = tiny(name)
        for number, group in enumerate(loaded.model_map.groups):
            offered = [CYCLE[(number + step) % len(CYCLE)] for step in range(len(CYCLE))]
            fmt = next(fmt for fmt in offered if _fits(loaded, group, fmt, container))
            chosen.update(dict.fromkeys(group.slots, fmt))
        return Planned(loaded, container, chosen, loaded.calibrate(chosen))

    return make


def _fits(loaded: Tiny, group: DecisionGroup, fmt: FormatName, container: Container) -> bool:
    plan = dict.fromkeys(group.slots, fmt)
    return not Planned(loaded, container, plan, loaded.calibrate(plan)).refusals()


@pytest.fixture
def uniform_plan(tiny: Callable[[str], Tiny]) -> Callable[[str, Container, str], Planned]:
    """One format for everything."""

    def make(name: str, container: Container, fmt: str) -> Planned:
        loaded = tiny(name)
        chosen = dict.fromkeys(loaded.model_map.slots, FormatName(fmt))
        return Planned(loaded, container, chosen, loaded.calibrate(chosen))

    return make


@pytest.fixture
def folder_plan() -> Callable[..., Planned]:
    """One format for everything in a model's folder."""

    def make(source: Path, container: Container, fmt: str, include: Sequence[str] = ()) -> Planned:
        model = load_model(source)
        loaded = Tiny(source, model, discover(model, include=include))
        chosen = dict.fromkeys(loaded.model_map.slots, FormatName(fmt))
        return Planned(loaded, container, chosen, loaded.calibrate(chosen))

    return make


@pytest.fixture(scope="session")
def input_ids() -> Tensor:
    """Token ids [2, 24]."""
    return torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
