"""Quantising a model that no memory holds: from safetensors to safetensors."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoq.api.config import parse_calibration, parse_container, refuse_idle_calibration
from autoq.api.exports._compressed_layers import asked_in_vain, chosen_layers, effective_bits
from autoq.api.stages import note_unseen_slots
from autoq.api.streamed.block_caches import cache_format, exported, uncalibrated_cache
from autoq.api.streamed.block_calibration import (
    CalibratedByBlocks,
    CalibrationData,
    calibrated_by_blocks,
)
from autoq.errors import InputError
from autoq.export import (
    SourceMatrices,
    StreamedPlan,
    WeightOnlyCalibration,
    check_destination,
    is_held,
    verify_written,
    warnings_for,
    write_checkpoint,
)
from autoq.formats import (
    FORMATS,
    NONE,
    Calibration,
    CalibrationMethod,
    CalibrationRecipe,
    Container,
    FormatName,
    QuantFormat,
)
from autoq.layers import LayerCalibration
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.quantize import input_scale
from autoq.models import discover
from autoq.models.folder import storage_dtype
from autoq.models.loading import unloaded_model
from autoq.progress import Progress, SilentProgress

_UNCALIBRATED_CACHE = (
    "the key/value cache is written with scales of 1, as engines take it where nothing was "
    "calibrated; with data (--calib) its scales are those of the model"
)

SHARD_BYTES = 256 << 20
"""Size at which the next file is started: what is held in memory, a matrix or two aside."""


def compress(
    model: str | Path,
    destination: str | Path,
    *,
    fmt: str,
    container: str | Container = Container.COMPRESSED_TENSORS,
    kv_format: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: str | Calibration = CalibrationMethod.BEST,
    calibration_data: str | None = None,
    calibration_sequences: int = 128,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantise every layer of a model folder to one format, which no memory has to hold.

    One matrix at a time is read, quantised, written and, at the end, read back and compared. Where
    the format stores a scale of the inputs, or data are named, the model is calibrated before as a
    search does it: a block in memory at a time, in float32, and what a block gives for all of the
    data on the disk, beside the destination. Otherwise no model is run, and everything follows from
    the weights alone.

    Args:
        model: a folder with config.json and safetensors weights.
        destination: the folder to create.
        fmt: the format of every layer that can take it; the others stay as they are, and are counted.
        container: "modelopt" or "compressed-tensors".
        kv_format: of the key/value cache in all layers, one of
            `autoq.formats.kv_cache.KV_CACHE_FORMATS`; None leaves it alone. Its scales are from the
            data, where the model is calibrated; where it is not, they are 1, for fp8 alone.
        include: globs that bring the output head or routers in.
        exclude: globs over layers to leave as they are.
        calibration: "best" and so on, as for a search. From weights alone "best", "scales" and "mse"
            choose block scales by the squared error that they leave, "max" and "rtn" by the largest
            magnitude, and there is no more to it; algorithms by name that need data are refused.
        calibration_data: as for a search; None calibrates formats with a stored input scale on the
            bundled text, and no others.
        calibration_sequences: how many sequences to calibrate on.
        sequence_length: tokens in a sequence.
        batch_size: sequences that run together.
        seed: of the choice of sequences.
        overwrite: replace a checkpoint that is at `destination`.
        trust_remote_code: run the model code that lies in the folder.
        progress: shows what is being done.
    Returns:
        The path, the container, bits per weight, stored bytes, files with their hashes, the layers
        that stayed as they are by reason, and what was compared.
    Raises:
        InputError: the format quantises nothing, no layer can take it, a pattern matches nothing, a
            calibration is named that the format cannot take or that lacks data, a layer is to be
            calibrated and in no block, or the cache's format does not go with the container, the
            heads, or no data.
        DataError: the calibration data cannot be read, or are too few.
        ModelError: the folder is no whole model, a weight or a layer's input holds NaN or infinity,
            or the model cannot be run block by block.
        ExportError: the container cannot express it, or the folder cannot be written.
        VerificationError: what was written does not read back bit for bit.
    """
    started = time.perf_counter()
    progress = progress or SilentProgress()
    wanted, held_in = FORMATS[FormatName(fmt)], parse_container(str(container))
    method = parse_calibration(str(calibration))
    data = CalibrationData(
        source=calibration_data,
        sequences=calibration_sequences,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    _refuse_none(wanted)
    kv_wanted = cache_format(kv_format, held_in)
    refuse_idle_calibration(method, [wanted.name])
    source, target = Path(model), Path(destination)
    check_destination(target, source, overwrite=overwrite)
    unloaded = unloaded_model(source, trust_remote_code=trust_remote_code)
    model_map = discover(unloaded, include=include, exclude=exclude)
    choice = chosen_layers(unloaded, model_map, wanted, held_in)
    scale_dtype: torch.dtype = getattr(torch, storage_dtype(source))
    for line in warnings_for(unloaded, model_map, choice.slot_formats, held_in, scale_dtype):
        progress.note(line)
    matrices = SourceMatrices.of(source, unloaded, model_map)
    with ExitStack() as stack:
        if calibration_data is None and not _needs_inputs(wanted, held_in):
            _say_what_needs_data(wanted, method, progress)
            weights = WeightOnlyCalibration(
                matrices, model_map, choice.slot_formats, method=method, scale_dtype=scale_dtype
            )
            cached: tuple[CachedLayer, ...] = ()
            if kv_wanted != NONE:
                cached = uncalibrated_cache(
                    source, model_map, kv_wanted, trust_remote_code=trust_remote_code
                )
                progress.note(_UNCALIBRATED_CACHE)
            found = CalibratedByBlocks(table=weights, description="weights alone", cached=cached)
        else:
            found = stack.enter_context(
                calibrated_by_blocks(
                    source,
                    target,
                    model_map,
                    choice.slot_formats,
                    data,
                    method=method,
                    container=held_in,
                    records_caches=kv_wanted != NONE,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
            )
            note_unseen_slots(found.table, progress)
        plan = StreamedPlan(
            unloaded,
            model_map,
            choice.slot_formats,
            found.table,
            held_in,
            scale_dtype,
            matrices=matrices,
            kv_cache=exported(found.cached, kv_wanted) if found.cached else None,
        )
        written = _write(plan, source, target, wanted, found.description, overwrite, progress)
    return {
        **written,
        "kv_format": kv_wanted,
        "effective_bits": effective_bits(model_map, choice),
        "left": {**asked_in_vain(model_map, include), **choice.left},
        "seconds": time.perf_counter() - started,
    }


def _write(
    plan: StreamedPlan,
    source: Path,
    target: Path,
    fmt: QuantFormat,
    calibrated_on: str,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    verification: dict[str, Any] = {}

    def verify(folder: Path, names: Collection[str]) -> None:
        with progress.task("reading back", 1) as advance:
            verification.update(asdict(verify_written(plan, folder, names)))
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
            provenance={"format": fmt.name, "calibrated_on": calibrated_on},
            verify=verify,
        )
    return {
        "path": str(result.path),
        "container": plan.container.value,
        "format": fmt.name,
        "calibrated_on": calibrated_on,
        "stored_bytes": result.stored_bytes,
        "files": [asdict(file) for file in result.files],
        "verification": {**verification, "container": plan.container.value},
    }


def _refuse_none(fmt: QuantFormat) -> None:
    if fmt.name == NONE:
        raise InputError(
            "compress needs a format that quantises, got none; copy the folder instead"
        )
    if not is_held(fmt.name):
        raise InputError(
            f"compress needs a format that a container holds, and none has a place for {fmt.name}; "
            "search it to measure it"
        )


def _needs_inputs(fmt: QuantFormat, container: Container) -> bool:
    """Whether checkpoints hold a scale of the inputs, which weights alone do not settle."""
    anything = LayerCalibration(weight_amax=1.0, input_amax=1.0)
    return input_scale(fmt, anything, container=container) is not None


def _say_what_needs_data(fmt: QuantFormat, method: Calibration, progress: Progress) -> None:
    """
    Raises:
        InputError: algorithms that need data were asked for by name.
    """
    taken = fmt.algorithm(method)
    if not (taken.searches_input_scales or taken.feeds_errors_back):
        return
    if isinstance(method, CalibrationRecipe):
        raise InputError(
            f"calibration {method} of {fmt.name} needs data, and none are named; name some (--calib), "
            "or take mse or rtn, which need none"
        )
    progress.note(
        f"{fmt.name} is written without input scales and error feedback (AWQ, SmoothQuant, "
        "GPTQ), which need data: name some (--calib), or search, and it loses less"
    )
