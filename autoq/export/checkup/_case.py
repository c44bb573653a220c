"""A module that an engine is asked about, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autoq.export._aliases import experts_parent, fused_siblings
from autoq.export.checkup._manifest import Declared, Manifest
from autoq.export.checkup._modules import StoredModule
from autoq.export.checkup._outcome import GARBAGE, REFUSES, SILENT, UNQUANTIZED


class Fate(StrEnum):
    """What becomes of a module when an engine loads it."""

    QUANTIZED = "quantised"
    UNQUANTIZED = UNQUANTIZED
    SILENT = SILENT
    GARBAGE = GARBAGE
    REFUSED = REFUSES


@dataclass(frozen=True, slots=True)
class Reading:
    """How an engine resolves one module."""

    fate: Fate
    declared: Declared | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """An engine, a checkpoint, and one of its modules."""

    engine: str
    manifest: Manifest
    modules: Mapping[str, StoredModule]
    module: StoredModule

    @property
    def model_type(self) -> Any:
        """As config.json has it."""
        return self.manifest.config.get("model_type")

    @property
    def fused(self) -> tuple[str, tuple[str, ...]]:
        """The name that the engine looks up, and the modules that it is made of."""
        name = self.module.name
        found = None if experts_parent(name) else fused_siblings(name, self.modules)
        return found or (name, (name,))


def nothing(reason: str = "") -> Reading:
    return Reading(Fate.UNQUANTIZED, reason=reason)


def as_declared(declared: Declared | None) -> Reading:
    return nothing() if declared is None else Reading(Fate.QUANTIZED, declared)
