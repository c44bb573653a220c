"""Writing a searched model as a checkpoint that engines load."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.export._compressed_tensors_manifest import compressed_tensors_manifest
from autoq.export._folder import check_destination, copy_companions, exported_files, written_folder
from autoq.export._folding import Calibrations
from autoq.export._fp8_manifest import fp8_manifest
from autoq.export._kv_cache import ExportedCache
from autoq.export._modelopt_manifest import modelopt_manifest
from autoq.export._plan import ExportPlan
from autoq.export._shards import ShardWriter
from autoq.export._source import model_config, storage_dtypes
from autoq.export._types import ExportedFile, ExportResult, Spelling
from autoq.export.rules import refusals, transformers_fp8_refusals
from autoq.formats import FormatName
from autoq.layers.quantize import Container
from autoq.models import ModelMap, SlotName

Progress = Callable[[int, int], None]
MAX_SHARD_BYTES = 5 * 10**9
NESTED_MANIFEST = "hf_quant_config.json"


def export_checkpoint(
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
    *,
    source: Path | None,
    destination: Path,
    container: Container,
    scale_dtype: torch.dtype,
    kv_cache: ExportedCache | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
    verify: Callable[[Path], None] | None = None,
    ready: Callable[[tuple[ExportedFile, ...]], None] | None = None,
    spelling: Spelling = Spelling.OWN,
) -> ExportResult:
    """Write the model as the plan says; the destination appears complete or not at all.

    Args:
        model: holds the original weights, in any dtype; it is not changed.
        slot_formats: format of every slot; slots that are not in it count as "none".
        calibration: of every quantised slot in its format.
        source: the model's folder, from which tokenizer and generation files are copied; None if
            the model came from elsewhere.
        destination: the folder to create.
        scale_dtype: dtype in which the model is stored, and INT4 scales with it. A tensor that
            `source` stores in another dtype keeps that one.
        kv_cache: calibrated layers and their formats; None leaves the key/value cache alone.
        overwrite: replace a checkpoint that is at `destination`.
        max_shard_bytes: size at which the next file is started; what is held in memory.
        progress: called with (steps done, all steps).
        provenance: what to say of the checkpoint's origin in its manifest; JSON values.
        verify: called with the folder when it is complete, before it takes the destination's name;
            if it raises, the folder is removed and the destination stays as it was.
        ready: called with its files after that, as the last thing before it takes the name.
        spelling: in which words compressed-tensors' FP8 blocks are written; no other plan has two.
    Raises:
        ExportError: the container cannot express the plan, the destination is in use, or it
            cannot be written.
        ModelError: a weight holds NaN or infinity.
    """
    plan = ExportPlan(
        model, model_map, slot_formats, calibration, container, scale_dtype, spelling=spelling
    )
    return write_checkpoint(
        replace(plan, kv_cache=kv_cache),
        source=source,
        destination=destination,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        provenance=provenance,
        verify=None if verify is None else lambda folder, _: verify(folder),
        ready=ready,
    )


def write_checkpoint(
    plan: ExportPlan,
    *,
    source: Path | None,
    destination: Path,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
    verify: Callable[[Path, Collection[str]], None] | None = None,
    ready: Callable[[tuple[ExportedFile, ...]], None] | None = None,
) -> ExportResult:
    """Write what a plan says, wherever its weights come from; the rest is `export_checkpoint`'s.

    Args:
        verify: also gets the names of all tensors that were handed to the writer.
    """
    refuse_inexpressible(plan)
    check_destination(destination, source, overwrite=overwrite)
    with written_folder(destination, overwrite=overwrite) as folder:
        writer = _write_tensors(plan, source, folder, max_shard_bytes, progress)
        if source is not None:
            copy_companions(source, folder)
        manifest = _write_configuration(plan, source, folder, provenance or {})
        files = exported_files(folder, writer.hashes)
        if verify is not None:
            verify(folder, writer.names)
        if ready is not None:
            ready(files)
    weights = [file.size_bytes for file in files if file.path.endswith(".safetensors")]
    return ExportResult(
        path=destination,
        container=plan.container,
        files=files,
        stored_bytes=sum(weights),
        manifest=manifest,
    )


def refuse_inexpressible(plan: ExportPlan) -> None:
    """Refuse a plan that its container cannot hold.

    Raises:
        ExportError: says the first thing that it cannot hold.
    """
    lines = refusals(
        plan.model, plan.model_map, plan.slot_formats, plan.calibration, plan.container
    )
    if plan.spelling is Spelling.TRANSFORMERS_FP8:
        lines += transformers_fp8_refusals(plan.model_map, plan.slot_formats, plan.container)
    lines = [*lines, *plan.cache_refusals()]
    if lines:
        more = f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else ""
        raise ExportError(f"{lines[0]}{more}")


def _write_tensors(
    plan: ExportPlan,
    source: Path | None,
    folder: Path,
    max_shard_bytes: int,
    progress: Progress | None,
) -> ShardWriter:
    writer = ShardWriter(folder, max_shard_bytes)
    groups = list(plan.unquantized_groups())
    total = len(plan.quantized_slots) + len(groups)
    for number, tensors in enumerate(_all_tensors(plan, groups, source)):
        writer.add(tensors)
        if progress is not None:
            progress(number + 1, total)
    writer.add(plan.cache_scales().items())
    writer.finish()
    return writer


def _all_tensors(
    plan: ExportPlan, groups: Iterable[Mapping[str, Tensor]], source: Path | None
) -> Iterator[Iterable[tuple[str, Tensor]]]:
    for slot in plan.quantized_slots:
        yield plan.packed(slot, plan.quantize(slot))
    dtypes = storage_dtypes(source) if source is not None else {}
    for group in groups:
        tensors, _ = plan.folded(group)
        yield [
            (name, _in_storage_dtype(tensor, dtypes.get(name, plan.scale_dtype)))
            for name, tensor in tensors.items()
        ]


def _in_storage_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_configuration(
    plan: ExportPlan, source: Path | None, folder: Path, provenance: Mapping[str, Any]
) -> Mapping[str, Any]:
    config = model_config(plan.model, source, plan.scale_dtype)
    manifest: Mapping[str, Any] = {}
    exported_by = {"name": "autoq", **provenance}
    if plan.quantized_slots:
        if plan.spelling is Spelling.TRANSFORMERS_FP8:
            manifest = fp8_manifest(plan.module_formats, exported_by)
        elif plan.container is Container.MODELOPT:
            both = modelopt_manifest(plan.module_formats, exported_by, plan.cache_format)
            manifest = both.flat
            _write_json(folder / NESTED_MANIFEST, both.nested)
        else:
            manifest = compressed_tensors_manifest(
                plan.module_formats, exported_by, plan.names.other_names, plan.cache_format
            )
        config["quantization_config"] = dict(manifest)
    _write_json(folder / "config.json", config)
    return manifest


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
