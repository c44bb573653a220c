"""Looking at a quantised checkpoint of anybody's: what is wrong, and what each engine makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent
from autoq.export.checkup._engines import Fate, Reading, read_as
from autoq.export.checkup._faults import faults
from autoq.export.checkup._files import StoredTensors
from autoq.export.checkup._fp8 import in_our_words, in_own_container
from autoq.export.checkup._manifest import Manifest, read_manifest
from autoq.export.checkup._modules import StoredModule, linear_modules
from autoq.export.checkup._rows import counted_rows
from autoq.formats import (
    ENGINES,
    HARDWARE,
    Container,
    Engine,
    FormatName,
    Hardware,
    Support,
    Target,
    support,
)

__all__ = ["CheckpointReport", "LayerReport", "Outcome", "check_checkpoint"]

UNQUANTIZED = "unquantised"
REFUSES = "refuses"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an engine does with a layer, in a word or with the GPUs it holds for; and why."""

    does: str
    reason: str
    runs: bool  # on the target; without one, on some hardware at least


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

    @property
    def runners(self) -> list[str]:
        """Engines, or the target, that run every layer."""
        names = list(self.layers[0].outcomes) if self.layers else []
        return [n for n in names if all(layer.outcomes[n].runs for layer in self.layers)]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, and the target, or any engine, runs all of it."""
        return not self.faults and bool(self.runners)


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
    return CheckpointReport(folder, manifest.container, found, layers)


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
    engines = ENGINES.values() if target is None else [target.engine]
    outcomes: dict[str, Outcome] = {}
    looked = _Looked(manifest, modules, module)
    for engine in engines:
        reading = read_as(engine.name, manifest, modules, module)
        if target is not None:
            outcomes[str(target)] = _on(target, reading, looked)
        else:
            outcomes[engine.name] = _anywhere(engine, reading, looked)
    return LayerReport(module.name, _stored(module, manifest), outcomes)


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


def _anywhere(engine: Engine, reading: Reading, looked: _Looked) -> Outcome:
    """On each generation of hardware; generations that are treated alike in one piece."""
    found = [
        (hardware, _on(Target(engine, hardware), reading, looked)) for hardware in _generations()
    ]
    if not any(outcome.runs for _, outcome in found):
        return found[-2][1]  # of the newest GPU; the last is the CPU
    if len({outcome.does for _, outcome in found}) == 1:
        return found[0][1]
    pieces, reasons = [], []
    for does, alike in groupby(found, key=lambda pair: pair[1].does):
        members = list(alike)
        if members[0][1].runs:
            pieces.append(f"{does} on {_span([hardware for hardware, _ in members])}")
            reasons.append(members[0][1].reason)
    return Outcome("; ".join(pieces), "; ".join(dict.fromkeys(reasons)), True)


def _generations() -> list[Hardware]:
    first = {entry.capability: entry for entry in HARDWARE.values()}
    return [first[key] for key in sorted(first, key=lambda key: (key is None, key or 0))]


def _span(hardware: Sequence[Hardware]) -> str:
    names = [entry.generation for entry in hardware]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
