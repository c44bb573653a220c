"""Quantising a model that no memory holds: tensor by tensor, from safetensors to safetensors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoq.api.config import parse_calibration, parse_container
from autoq.api.exporting import inexpressible
from autoq.errors import InputError
from autoq.export import (
    SourceMatrices,
    StreamedPlan,
    WeightOnlyCalibration,
    check_destination,
    verify_written,
    warnings_for,
    write_checkpoint,
)
from autoq.export._layouts import LAYOUTS
from autoq.formats import (
    FORMATS,
    NONE,
    Calibration,
    CalibrationMethod,
    Container,
    FormatName,
    QuantFormat,
)
from autoq.layers import LayerCalibration
from autoq.layers.quantize import input_scale
from autoq.models import GroupName, ModelMap, SlotName, discover
from autoq.models.folder import storage_dtype
from autoq.models.loading import unloaded_model
from autoq.progress import Progress, SilentProgress

SHARD_BYTES = 256 << 20
"""Size at which the next file is started: what is held in memory, a matrix or two aside."""


def compress(
    model: str | Path,
    destination: str | Path,
    *,
    fmt: str,
    container: str | Container = Container.COMPRESSED_TENSORS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: str | Calibration = CalibrationMethod.BEST,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantise every layer of a model folder to one format, from the weights alone.

    No data is needed and no model is run: one matrix at a time is read, quantised, written and, at
    the end, read back and compared. So only formats can be had whose inputs are quantised at run
    time under scales of their own, or not at all.

    Args:
        model: a folder with config.json and safetensors weights.
        destination: the folder to create.
        fmt: the format of every layer that can take it; the others stay as they are, and are counted.
        container: "modelopt" or "compressed-tensors".
        include: globs that bring the output head or routers in.
        exclude: globs over layers to leave as they are.
        calibration: "best", "scales" and "mse" choose block scales by the squared error that they
            leave, "max" and "rtn" by the largest magnitude.
        overwrite: replace a checkpoint that is at `destination`.
        trust_remote_code: run the model code that lies in the folder.
        progress: shows what is being done.
    Returns:
        The path, the container, bits per weight, stored bytes, files with their hashes, the layers
        that stayed as they are by reason, and what was compared.
    Raises:
        InputError: the format needs calibrated inputs, no layer can take it, or a pattern matches
            nothing.
        ModelError: the folder is no whole model, or a weight holds NaN or infinity.
        ExportError: the container cannot express it, or the folder cannot be written.
        VerificationError: what was written does not read back bit for bit.
    """
    started = time.perf_counter()
    progress = progress or SilentProgress()
    wanted, held_in = FORMATS[FormatName(fmt)], parse_container(str(container))
    refuse_calibrated_inputs(wanted, held_in)
    source, target = Path(model), Path(destination)
    check_destination(target, source, overwrite=overwrite)
    unloaded = unloaded_model(source, trust_remote_code=trust_remote_code)
    model_map = discover(unloaded, include=include, exclude=exclude)
    choice = _choose(unloaded, model_map, wanted, held_in)
    plan = _plan(source, unloaded, model_map, choice, parse_calibration(str(calibration)), held_in)
    taken = wanted.algorithm(parse_calibration(str(calibration)))
    if taken.searches_input_scales or taken.feeds_errors_back:
        progress.note(
            f"{wanted.name} is written without input scales and error feedback (AWQ, SmoothQuant, "
            "GPTQ), which need data: a search loses less"
        )
    for line in warnings_for(unloaded, model_map, choice.slot_formats, held_in, plan.scale_dtype):
        progress.note(line)
    verification: dict[str, Any] = {}

    def verify(folder: Path, digests: Mapping[str, str]) -> None:
        with progress.task("reading back", 1) as advance:
            verification.update(asdict(verify_written(plan, folder, digests)))
            advance()

    steps = len(plan.quantized_slots) + sum(1 for _ in plan.unquantized_groups())
    with progress.task("quantising", steps) as advance:
        result = write_checkpoint(
            plan,
            source=source,
            destination=target,
            overwrite=overwrite,
            max_shard_bytes=SHARD_BYTES,
            progress=lambda done, total: advance(1),
            provenance={"format": wanted.name, "calibrated_on": "weights alone"},
            verify=verify,
        )
    return {
        "path": str(result.path),
        "container": held_in.value,
        "format": wanted.name,
        "effective_bits": _effective_bits(model_map, choice),
        "stored_bytes": result.stored_bytes,
        "left": dict(choice.left),
        "files": [asdict(file) for file in result.files],
        "verification": {**verification, "container": held_in.value},
        "seconds": time.perf_counter() - started,
    }


def refuse_calibrated_inputs(fmt: QuantFormat, container: Container) -> None:
    """Refuse a format that weights alone do not settle.

    Raises:
        InputError: it quantises nothing, or its checkpoints hold a scale of the inputs.
    """
    if fmt.name == NONE:
        raise InputError(
            "compress needs a format that quantises, got none; copy the folder instead"
        )
    if not _needs_inputs(fmt, container):
        return
    others = [
        entry.name
        for entry in FORMATS.values()
        if (container, entry.name) in LAYOUTS and not _needs_inputs(entry, container)
    ]
    raise InputError(
        f"a format for compress must need no calibrated inputs, and {fmt.name} in {container.value} "
        f"stores a scale of them; search the model instead, or take one of {', '.join(others)}"
    )


def _needs_inputs(fmt: QuantFormat, container: Container) -> bool:
    anything = LayerCalibration(weight_amax=1.0, input_amax=1.0)
    return input_scale(fmt, anything, container=container) is not None


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which layers take the format, and why others do not."""

    slot_formats: dict[SlotName, FormatName]
    left: dict[GroupName, str]


def _choose(
    model: nn.Module, model_map: ModelMap, fmt: QuantFormat, container: Container
) -> _Choice:
    """
    Raises:
        InputError: no layer can take the format.
    """
    left = {
        group: reason
        for (group, _), reason in inexpressible(model, model_map, [fmt.name], container).items()
    }
    chosen = [group for group in model_map.groups if group.name not in left]
    if not chosen:
        why = next(iter(left.values()), "the model has none that can be quantised")
        raise InputError(f"some layer must be able to take {fmt.name}, and none is: {why}")
    formats = {slot: fmt.name for group in chosen for slot in group.slots}
    return _Choice({slot: formats.get(slot, NONE) for slot in model_map.slots}, left)


def _plan(
    source: Path,
    model: nn.Module,
    model_map: ModelMap,
    choice: _Choice,
    method: Calibration,
    container: Container,
) -> StreamedPlan:
    matrices = SourceMatrices.of(source, model, model_map)
    scale_dtype: torch.dtype = getattr(torch, storage_dtype(source))
    calibration = WeightOnlyCalibration(
        matrices, model_map, choice.slot_formats, method=method, scale_dtype=scale_dtype
    )
    return StreamedPlan(
        model,
        model_map,
        choice.slot_formats,
        calibration,
        container,
        scale_dtype,
        matrices=matrices,
    )


def _effective_bits(model_map: ModelMap, choice: _Choice) -> float:
    """Bits per weight over the layers that could be quantised, block scales included."""
    slots = model_map.slots
    bits = sum(
        FORMATS[fmt].storage_bits(slots[name].out_features, slots[name].in_features).effective_bits
        for name, fmt in choice.slot_formats.items()
    )
    return bits / sum(slot.weights for slot in slots.values())
