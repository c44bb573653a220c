"""Proving that what was written is what was searched."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError, VerificationError
from autoq.export._folding import Calibrations
from autoq.export._fp8_manifest import fp8_faults
from autoq.export._kv_cache import ExportedCache
from autoq.export._plan import ExportPlan
from autoq.export._read_back import same_bits
from autoq.export._types import Spelling, VerificationReport
from autoq.export.export import NESTED_MANIFEST
from autoq.export.lint import compressed_tensors_faults, modelopt_faults
from autoq.export.reader import QuantizedCheckpoint, SlotReader, read_quantized
from autoq.formats import FormatName
from autoq.layers.quantize import Container, dequantize_weight
from autoq.models import ModelMap, SlotName, WeightSlot

_ACROSS_FUSION = {
    Container.MODELOPT: ("weight_scale_2", "input_scale", "pre_quant_scale"),
    Container.COMPRESSED_TENSORS: ("weight_global_scale", "input_global_scale", "input_scale"),
}
"""Tensors that the members of a fusion set have to share, bit for bit."""


def verify_checkpoint(
    path: Path,
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
    container: Container,
    scale_dtype: torch.dtype,
    spelling: Spelling = Spelling.OWN,
    kv_cache: ExportedCache | None = None,
) -> VerificationReport:
    """Read a checkpoint back and compare all of it with the searched model.

    Manifests must say the same and name every linear once, as each engine reads them; tensors
    must be as the container tabulates them; quantised matrices must dequantise to the searched
    model's, bit for bit, and everything else must equal the source's, bit for bit.

    Args:
        path: the checkpoint's folder.
        model: holds the original weights; other arguments are those of `export_checkpoint`.
    Raises:
        VerificationError: names the first tensor or module that differs.
    """
    plan = ExportPlan(
        model, model_map, slot_formats, calibration, container, scale_dtype, spelling=spelling
    )
    try:
        return _verify(replace(plan, kv_cache=kv_cache), path)
    except ExportError as error:
        raise VerificationError(f"{path} does not read back: {error}") from error


def verify_written(plan: ExportPlan, path: Path, names: Collection[str]) -> VerificationReport:
    """Compare a checkpoint with what was handed to its writer, without the original weights.

    Manifests, names and shapes are checked as `verify_checkpoint` does; that every tensor reads
    back bit for bit its writer has seen.

    Args:
        names: of every tensor that was handed over.
    Raises:
        VerificationError: names the first tensor or module that differs.
    """
    try:
        checkpoint = read_quantized(path)
        _verify_manifest(plan, checkpoint)
        _verify_fusion_sets(plan, checkpoint)
        _verify_names(checkpoint, names)
        reader = SlotReader(checkpoint, plan.names, plan.model_map)
        for slot in plan.quantized_slots:
            reader.check(slot.name)
            checkpoint.release()
    except ExportError as error:
        raise VerificationError(f"{path} does not read back: {error}") from error
    return _report(plan, path, len(checkpoint.unquantized_names), 0)


def _verify_names(checkpoint: QuantizedCheckpoint, written: Collection[str]) -> None:
    stored = set(checkpoint.tensor_names)
    for name in sorted(stored.symmetric_difference(written)):
        if name in stored:
            raise VerificationError(f"{checkpoint.path} has a tensor {name} that the model has not")
        raise VerificationError(
            f"{checkpoint.path} lacks {name}, which was written; write it again"
        )


def _verify(plan: ExportPlan, path: Path) -> VerificationReport:
    checkpoint = read_quantized(path)
    _verify_manifest(plan, checkpoint)
    _verify_fusion_sets(plan, checkpoint)
    reader = SlotReader(checkpoint, plan.names, plan.model_map)
    seen: set[str] = set()
    for slot in plan.quantized_slots:
        seen.update(_verify_slot(plan, reader, slot))
        checkpoint.release()  # so that no more than one matrix is in memory
    for name, scale in plan.cache_scales().items():
        _compare(name, checkpoint.tensor(name), scale)
        seen.add(name)
    unquantized, folded = _verify_unquantized(plan, checkpoint)
    surplus = sorted(set(checkpoint.tensor_names) - seen - unquantized)
    if surplus:
        raise VerificationError(f"{path} has a tensor {surplus[0]} that the model has not")
    return _report(plan, path, len(unquantized), folded)


def _report(plan: ExportPlan, path: Path, unquantized: int, folded: int) -> VerificationReport:
    return VerificationReport(
        container=plan.container,
        quantized_matrices=len(plan.quantized_slots),
        unquantized_tensors=unquantized,
        folded_norms=folded,
        stored_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
    )


def _verify_manifest(plan: ExportPlan, checkpoint: QuantizedCheckpoint) -> None:
    if not plan.quantized_slots:
        faults = [f"nothing is quantised, and {checkpoint.path} has a manifest"]
        faults = faults if checkpoint.manifest else []
    elif checkpoint.container is not plan.container:
        faults = [f"the container is {checkpoint.container}, not {plan.container}"]
    elif checkpoint.spelling is not plan.spelling:
        faults = [f"it is written in the words of {checkpoint.spelling}, not {plan.spelling}"]
    elif plan.spelling is Spelling.TRANSFORMERS_FP8:
        faults = list(fp8_faults(checkpoint.manifest, plan.module_formats))
    elif plan.container is Container.MODELOPT:
        nested = _nested_manifest(checkpoint.path)
        faults = list(
            modelopt_faults(checkpoint.manifest, nested, plan.module_formats, plan.cache_format)
        )
    else:
        faults = list(
            compressed_tensors_faults(checkpoint.manifest, plan.module_formats, plan.cache_format)
        )
    if faults:
        raise VerificationError(f"the manifest of {checkpoint.path} is wrong: {faults[0]}")


def _nested_manifest(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((path / NESTED_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path / NESTED_MANIFEST} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise VerificationError(f"{path / NESTED_MANIFEST} must hold an object")
    return content


def _verify_fusion_sets(plan: ExportPlan, checkpoint: QuantizedCheckpoint) -> None:
    for members in plan.names.fusion_sets(plan.model_map):
        stored = [checkpoint[name].tensors for name in members if name in checkpoint]
        for suffix in _ACROSS_FUSION[plan.container]:
            found = [tensors.get(suffix) for tensors in stored]
            if any(not _same(tensor, found[0]) for tensor in found):
                raise VerificationError(f"{', '.join(members)} must share one {suffix}")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return same_bits(one, other)


def _verify_slot(plan: ExportPlan, reader: SlotReader, slot: WeightSlot) -> list[str]:
    """Names of the slot's tensors, all of them as searched."""
    weight = plan.quantize(slot)
    expected = dict(plan.packed(slot, weight))
    for name, tensor in expected.items():
        _compare(name, reader.tensor(name), tensor)
    searched = dequantize_weight(weight, container=plan.container)
    if not same_bits(reader.dequantized(slot.name), searched):
        raise VerificationError(
            f"{slot.name} dequantises to other values than the searched model's; this is a fault "
            "of autoq, please report it"
        )
    return list(expected)


def _verify_unquantized(plan: ExportPlan, checkpoint: QuantizedCheckpoint) -> tuple[set[str], int]:
    """Names of the tensors that are stored as they are, and how many have a scale in them."""
    names: set[str] = set()
    folded = 0
    for group in plan.unquantized_groups():
        tensors, with_scale = plan.folded(group)
        folded += with_scale
        for name, tensor in tensors.items():
            names.add(name)
            stored = checkpoint.tensor(name)
            _compare(
                name, stored, tensor.to(stored.dtype) if stored.is_floating_point() else tensor
            )
        checkpoint.release()
    return names, folded


def _compare(name: str, stored: Tensor, expected: Tensor) -> None:
    if stored.dtype != expected.dtype or stored.shape != expected.shape:
        raise VerificationError(
            f"{name} must be {expected.dtype} {tuple(expected.shape)}, and the checkpoint has "
            f"{stored.dtype} {tuple(stored.shape)}"
        )
    if not same_bits(stored, expected.cpu()):
        differing = int((stored != expected.cpu()).sum())
        raise VerificationError(
            f"{name} differs from the searched model's in {differing} of {stored.numel()} values; "
            "the file was changed or the disk is failing: export again"
        )
