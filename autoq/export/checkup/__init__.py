"""Looking at a quantised checkpoint of anybody's: what is wrong, and what each engine makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent
from autoq.export.checkup._cache import CacheReport, cache_report
from autoq.export.checkup._engines import Fate, Reading, read_as
from autoq.export.checkup._faults import faults
from autoq.export.checkup._files import StoredTensors
from autoq.export.checkup._fp8 import in_our_words, in_own_container
from autoq.export.checkup._manifest import Manifest, read_manifest
from autoq.export.checkup._modules import StoredModule, linear_modules
from autoq.export.checkup._outcome import REFUSES, UNKNOWN, UNQUANTIZED, Outcome, outcomes
from autoq.export.checkup._rows import counted_rows
from autoq.formats import (
    ENGINES,
    Container,
    FormatName,
    Support,
    Target,
    support,
)

__all__ = ["CacheReport", "CheckpointReport", "LayerReport", "Outcome", "check_checkpoint"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer."""

    name: str
    stored: str  # the format, in the manifest's words; "unquantised"
    outcomes: Mapping[str, Outcome]  # by engine, or by the target


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """All that was found; nothing was run."""

    path: Path
    container: Container | None
    faults: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    cache: CacheReport | None = None  # None: the manifests state no quantised key/value cache

    @property
    def runners(self) -> list[str]:
        """Engines, or the target, that run every layer, and keep the key/value cache as stated."""
        names = list(self.layers[0].outcomes) if self.layers else []
        found = [layer.outcomes for layer in self.layers]
        if self.cache is not None:
            found.append(self.cache.outcomes)
        return [name for name in names if all(outcomes[name].runs for outcomes in found)]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, and the target, or any engine, runs all of it."""
        return not self.faults and bool(self.runners)

    def as_plain(self) -> dict[str, Any]:
        """Plain data for JSON: what `autoq verify --json` prints."""
        cache = self.cache
        return {
            "checkpoint": str(self.path),
            "container": self.container,
            "sound": self.is_sound,
            "runs_in": self.runners,
            "faults": list(self.faults),
            "layers": [
                {"module": layer.name, "stored": layer.stored, "outcomes": _plain(layer.outcomes)}
                for layer in self.layers
            ],
            "kv_cache": None
            if cache is None
            else {"stored": cache.stored, "outcomes": _plain(cache.outcomes)},
        }


def _plain(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        name: {"does": found.does, "runs": found.runs, "reason": found.reason}
        for name, found in outcomes.items()
    }


def check_checkpoint(path: Path | str, target: Target | None = None) -> CheckpointReport:
    """Every check that needs no GPU and no model.

    Args:
        path: a checkpoint's folder; autoq's, ModelOpt's, llm-compressor's.
        target: where it is to run; None looks at every engine on all its hardware.
    Raises:
        ExportError: the folder is no readable checkpoint, or its files are malformed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = StoredTensors(folder)
    model_type = "" if manifest is None else str(manifest.config.get("model_type"))
    modules = linear_modules(tensors, model_type)
    if manifest is not None and manifest.is_fp8:
        modules = in_our_words(modules)
    if manifest is None:
        return CheckpointReport(folder, None, tuple(_faults_without_manifest(modules)), ())
    found = tuple(faults(manifest, tensors, modules))
    layers = tuple(_layer(module, manifest, modules, target) for module in modules.values())
    cache = cache_report(manifest, tuple(tensors), target)
    return CheckpointReport(folder, manifest.container, found, layers, cache)


def _faults_without_manifest(modules: Mapping[str, StoredModule]) -> Iterator[str]:
    hit = next((module.name for module in modules.values() if module.is_quantized), None)
    if hit is None:
        raise ExportError(
            "there is nothing to verify: no manifest, and no tensor is quantised; give a "
            "checkpoint that was exported"
        )
    yield f"{hit} has codes or scales, and neither config.json nor hf_quant_config.json says so"


@dataclass(frozen=True, slots=True)
class _Looked:
    """What is looked at: a module of a checkpoint."""

    manifest: Manifest
    modules: Mapping[str, StoredModule]
    module: StoredModule

    def misfit(self, record: Support, fmt: FormatName) -> str | None:
        """Why the engine does not take this matrix in a format that it runs."""
        container, module = self.manifest.container, self.module
        config = self.manifest.config
        rows = counted_rows(record, container, fmt, self.modules, module, config)
        is_expert = experts_parent(module.name) is not None
        found = (record.misfit(count, is_expert=is_expert) for count in rows)
        return next((reason for reason in found if reason is not None), None)


def _layer(
    module: StoredModule,
    manifest: Manifest,
    modules: Mapping[str, StoredModule],
    target: Target | None,
) -> LayerReport:
    looked = _Looked(manifest, modules, module)

    def on(where: Target) -> Outcome:
        return _on(where, read_as(where.engine.name, manifest, modules, module), looked)

    found = outcomes(tuple(ENGINES.values()), target, on)
    return LayerReport(module.name, _stored(module, manifest), found)


def _stored(module: StoredModule, manifest: Manifest) -> str:
    try:
        declared = manifest.declared(module.name)
    except ExportError:
        declared = None
    if declared is None:
        return "quantised, undeclared" if module.is_quantized else UNQUANTIZED
    return str(declared.format or declared.label)


def _on(target: Target, reading: Reading, looked: _Looked) -> Outcome:
    if reading.fate is Fate.UNQUANTIZED:
        return Outcome(UNQUANTIZED, "", True)
    if reading.fate is not Fate.QUANTIZED or reading.declared is None:
        return Outcome(reading.fate.value, reading.reason, False)
    fmt = reading.declared.format
    if fmt is None:
        return Outcome(UNKNOWN, f"autoq's tables do not have {reading.declared.label}", False)
    record = support(target, looked.manifest.container, fmt)
    if looked.manifest.is_fp8:
        record = in_own_container(record, target)
    verdict, reason = record.within(is_mixed=looked.manifest.is_mixed)
    if not verdict.runs:
        return Outcome(REFUSES, reason, False)
    misfit = looked.misfit(record, fmt)
    if misfit is not None:
        return Outcome(REFUSES, f"{target.engine.title} {misfit}", False)
    return Outcome(verdict.value, reason, True)
