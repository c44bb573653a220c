"""Writing a searched model as an ONNX graph with Q/DQ nodes, and running it in onnxruntime.

The graph computes in float32 what the simulation does: codes and scales are initialisers, the
inputs of quantised products go through QuantizeLinear and DequantizeLinear, and what is not
quantised is as torch's exporter writes it. It takes whole sequences, or with the keys and values of
earlier tokens the next ones; of a model with an encoder and a decoder what both of them read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from autoq.errors import ExportError
from autoq.export._folder import check_destination, copy_companions, exported_files, written_folder
from autoq.export._folding import folding_refusals
from autoq.export._onnx_experts import dense_refusal
from autoq.export._onnx_graph import fill_products, narrow_matrices
from autoq.export._onnx_interface import interface_of
from autoq.export._onnx_numerics import onnx_formats, onnx_refusal
from autoq.export._onnx_trace import traced
from autoq.export._onnx_verify import (
    ONNX_DATA,
    ONNX_FILE,
    OnnxReport,
    plan_options,
    tensor_digests,
    verify_onnx,
)
from autoq.export._plan import ExportPlan
from autoq.export._source import model_config
from autoq.export._types import ExportedFile
from autoq.formats import FORMATS, NONE, FormatName
from autoq.models import ModelMap, SlotKind, SlotName
from autoq.models.forward import refuse_other_inputs

__all__ = [
    "ONNX_DATA",
    "ONNX_FILE",
    "OnnxExport",
    "OnnxReport",
    "export_onnx",
    "onnx_formats",
    "onnx_refusals",
    "onnx_warnings",
    "verify_onnx",
]

_METADATA = "autoq"
"""Key in the graph's metadata that says where it comes from; a JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """A graph that is complete on disk, and was run."""

    path: Path
    files: tuple[ExportedFile, ...]
    stored_bytes: int  # of the graph and its data
    report: OnnxReport


def onnx_refusals(plan: ExportPlan) -> list[str]:
    """Everything that keeps the plan from being written as ONNX, a line each, by name.

    Raises:
        ModelError: the model takes no token ids.
    """
    refuse_other_inputs(plan.model)
    quantized = {slot: fmt for slot, fmt in plan.slot_formats.items() if fmt != NONE}
    return [
        *_format_lines(quantized),
        *_slot_lines(plan.model, plan.model_map, quantized),
        *folding_refusals(plan.model, plan.model_map, quantized, plan.calibration),
    ]


def export_onnx(
    plan: ExportPlan,
    *,
    source: Path | None,
    destination: Path,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[], None] | None = None,
    with_past: bool = False,
) -> OnnxExport:
    """Write `model.onnx` and `model.onnx.data`; the folder appears complete and checked, or not.

    What INT4 weights beside FP8 inputs compute is that of `plan.container`, which the graph holds
    either way.

    Args:
        plan: the model holds the original weights, in any dtype; it is not changed.
        source: the model's folder, from which configuration and tokenizer are copied.
        destination: the folder to create.
        overwrite: replace a checkpoint that is at `destination`.
        provenance: what to say of the graph's origin in its metadata; JSON values.
        progress: called after each quantised matrix.
        with_past: the graph takes keys and values of earlier tokens and gives those of all, as
            "past_key_values.N.key" and "present.N.key", FLOAT [batch, heads, tokens, features].
    Raises:
        ExportError: ONNX cannot hold the plan, torch cannot trace the model, the destination is in
            use, or it cannot be written.
        VerificationError: what was written does not read back bit for bit, or onnxruntime's logits
            are not the simulation's.
    """
    refuse_onnx(plan)
    check_destination(destination, source, overwrite=overwrite)
    interface = interface_of(plan.model, with_past=with_past)
    graph = traced(plan, interface)
    narrow_matrices(graph, plan.scale_dtype)
    fill_products(graph, plan, progress or _nothing)
    graph.metadata_props[_METADATA] = json.dumps(_metadata(plan, provenance or {}))
    with written_folder(destination, overwrite=overwrite) as folder:
        digests = tensor_digests(graph)
        ir.save(graph, folder / ONNX_FILE, external_data=ONNX_DATA)
        if source is not None:
            copy_companions(source, folder)
        config = model_config(plan.model, source, plan.scale_dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        del graph
        report = verify_onnx(folder, plan, digests, interface)
        files = exported_files(folder)
    return OnnxExport(
        path=destination, files=files, stored_bytes=report.stored_bytes, report=report
    )


def onnx_warnings(plan: ExportPlan) -> list[str]:
    """What a user should know about the result before it is written, a line each."""
    slots = plan.model_map.slots.values()
    numbers = [slot.expert for slot in slots if slot.expert is not None]
    if not numbers:
        return []
    line = (
        f"the graph computes all of a layer's {max(numbers) + 1} experts for every token, as "
        "which are chosen is not known when it is traced: right, and for small mixtures only"
    )
    return [line]


def refuse_onnx(plan: ExportPlan) -> None:
    """Refuse a plan that ONNX cannot hold.

    Raises:
        ExportError: says the first thing that it cannot hold.
    """
    lines = onnx_refusals(plan)
    if lines:
        more = f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else ""
        raise ExportError(f"{lines[0]}{more}")


def _format_lines(quantized: Mapping[SlotName, FormatName]) -> Iterator[str]:
    first: dict[FormatName, SlotName] = {}
    for name, fmt in quantized.items():
        first.setdefault(fmt, name)
    for fmt, name in first.items():
        reason = onnx_refusal(FORMATS[fmt])
        if reason is not None:
            yield (
                f"{name} cannot be {fmt} in onnx: {reason}; formats that it can hold: "
                f"{', '.join(onnx_formats())}"
            )


def _slot_lines(
    model: nn.Module, model_map: ModelMap, quantized: Mapping[SlotName, FormatName]
) -> Iterator[str]:
    tied = _shared_parameters(model)
    for name in quantized:
        slot = model_map.slots[name]
        reason = None
        if slot.kind is SlotKind.EXPERT:
            reason = dense_refusal(model.get_submodule(slot.module))
        if reason is not None:
            yield (
                f"{name} cannot be quantised in onnx: {reason}; choose another container, or bind "
                "the experts to none"
            )
        if f"{slot.module}.{slot.parameter}" in tied:
            yield (
                f"{name} cannot be quantised in onnx: its matrix serves another module, too; bind "
                "it to none"
            )


def _shared_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that are others', too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _metadata(plan: ExportPlan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    formats = {slot.name: plan.slot_formats[slot.name] for slot in plan.quantized_slots}
    return {
        **provenance,
        "numerics": plan.container.value,
        "formats": formats,
        "onnxruntime_options": plan_options(plan),
    }


def _nothing() -> None:
    """Nobody asked to be told."""
