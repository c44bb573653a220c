"""What a container cannot express, and what its readers do with what it can.

Checked against vLLM 0.33, SGLang 0.5.23, TensorRT-LLM 1.2, transformers 5.23 with
compressed-tensors 0.20.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.export._aliases import experts_parent
from autoq.export._folding import Calibrations, folding_refusals, stored_scale
from autoq.export._fp8_manifest import BLOCK_FORMAT, BLOCK_SIZE
from autoq.export._layouts import LAYOUTS, WITHOUT_LAYOUT
from autoq.export._plan import checkpoint_names
from autoq.export._types import Spelling
from autoq.formats import FORMATS, NONE, FormatName, WeightScaling
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container
from autoq.models import ModelMap, SlotKind, SlotName

_SlotFormats = Mapping[SlotName, FormatName]

# These classes of transformers look at a linear's `weight` when they fill in what a checkpoint lacks,
# and a packed linear has none: end of the class's name -> family, and the linears, None for all.
_WEIGHT_READERS: Mapping[str, tuple[str, str | None]] = {
    "DenseActDense": ("T5", None),
    "DenseGatedActDense": ("T5", None),
    "FalconLinear": ("Falcon", None),
    "MambaMixer": ("Mamba", "out_proj"),
}

_EXPERT_FORMATS = (FormatName("int4_awq"), FormatName("int8_wo"))
"""What transformers unpacks of experts and computes the simulation's logits from."""

_OWN_EXPERTS = "Llama4TextExperts"
"""Class of experts that transformers takes apart in compressed-tensors checkpoints."""


def refusals(
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
    container: Container,
) -> list[str]:
    """Everything that keeps the plan from being written to the container, a line each, by name.

    Args:
        slot_formats: format of every slot; slots that are not in it count as "none".
        calibration: of every quantised slot in its format.
    Returns:
        Empty if the plan can be exported.
    """
    quantized = {slot: fmt for slot, fmt in slot_formats.items() if fmt != NONE}
    lines = [
        *_layout_lines(quantized, container),
        *_slot_lines(model_map, quantized, calibration),
        *_tied_lines(model, model_map, quantized),
        *_group_lines(model_map, slot_formats, calibration),
        *folding_refusals(model, model_map, quantized, calibration),
    ]
    if container is Container.MODELOPT:
        lines += _modelopt_scale_lines(model_map, quantized, calibration)
    if container is Container.COMPRESSED_TENSORS:
        lines += _compressed_tensors_lines(model, model_map, quantized, calibration)
    if not lines:
        lines += _name_lines(model, model_map, slot_formats, container)
    return list(dict.fromkeys(lines))


def transformers_fp8_refusals(
    model_map: ModelMap, slot_formats: _SlotFormats, container: Container
) -> list[str]:
    """What keeps a plan from transformers' own fp8 checkpoints, beyond `refusals`, a line each.

    Args:
        container: must be compressed-tensors, whose blocks these are in other words.
    """
    lines = [
        f"{name} cannot be {fmt} in {Spelling.TRANSFORMERS_FP8}, which holds {BLOCK_FORMAT} alone; "
        f"search with --formats {BLOCK_FORMAT}, or choose another container"
        for name, fmt in slot_formats.items()
        if fmt not in (NONE, BLOCK_FORMAT)
    ]
    if container is not Container.COMPRESSED_TENSORS:
        lines.append(f"{Spelling.TRANSFORMERS_FP8} is a spelling of compressed-tensors' blocks")
    for name, fmt in slot_formats.items():
        rows = model_map.slots[name].out_features if fmt == BLOCK_FORMAT else 0
        height = BLOCK_SIZE[0]
        if rows > height and rows % height:
            lines.append(
                f"{name} has {rows} rows, no multiple of {height}, and transformers would divide them "
                f"evenly among {-(-rows // height)} scales; leave it at none"
            )
    return lines


def _layout_lines(quantized: _SlotFormats, container: Container) -> Iterator[str]:
    for name, fmt in quantized.items():
        if (container, fmt) not in LAYOUTS:
            yield f"{name} cannot be {fmt} in {container}: {WITHOUT_LAYOUT[container, fmt]}"


def _slot_lines(
    model_map: ModelMap, quantized: _SlotFormats, calibration: Calibrations
) -> Iterator[str]:
    for name, fmt in quantized.items():
        slot = model_map.slots.get(name)
        if slot is None:
            yield f"{name} is to be {fmt}, and the model has no such slot; search it again"
            continue
        reason = FORMATS[fmt].refusal(slot.out_features, slot.in_features)
        if reason is not None:
            yield f"{name} cannot be {fmt}: {reason}; choose another format for it"
        entry = calibration.get((name, fmt))
        if entry is None:
            yield f"{name} has no calibration for {fmt}; calibrate it first"
            continue
        yield from _calibration_lines(name, entry)


def _calibration_lines(name: SlotName, entry: LayerCalibration) -> Iterator[str]:
    for what, amax in (("weight_amax", entry.weight_amax), ("input_amax", entry.input_amax)):
        if not (math.isfinite(amax) and amax >= 0):
            yield f"{what} of {name} must be finite and not negative, got {amax}; calibrate again"
    scale = entry.pre_quant_scale
    if scale is None:
        return
    mantissas, _ = torch.frexp(scale.float())
    if not bool((mantissas == 0.5).all()):
        yield f"the AWQ scale of {name} must hold powers of two only; calibrate it again"


def _tied_lines(model: nn.Module, model_map: ModelMap, quantized: _SlotFormats) -> Iterator[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {**{source: copy for copy, source in tied.items()}, **tied}
    for name in quantized:
        slot = model_map.slots.get(name)
        other = shared.get(f"{slot.module}.{slot.parameter}") if slot else None
        if other is not None:
            yield (
                f"{name} shares its weight with {other}, which a checkpoint holds once and "
                "unquantised; leave it at none"
            )


def _group_lines(
    model_map: ModelMap, slot_formats: _SlotFormats, calibration: Calibrations
) -> Iterator[str]:
    for group in model_map.groups:
        formats = {slot_formats.get(slot, NONE) for slot in group.slots}
        if formats == {NONE}:
            continue
        if len(formats) > 1:
            yield (
                f"{group.reason}, so {group.name} takes one format, got "
                f"{', '.join(sorted(formats))}; choose one"
            )
            continue
        fmt = formats.pop()
        for fused in group.fusion_sets:
            yield from _shared_lines(fused, fmt, calibration)
        for fused in group.input_sets:
            entries = [calibration[slot, fmt] for slot in fused if (slot, fmt) in calibration]
            if len({entry.input_amax for entry in entries}) > 1:
                yield f"{fused[0]} and its like share an input, and input_amax differs"


def _shared_lines(
    fused: tuple[SlotName, ...], fmt: FormatName, calibration: Calibrations
) -> Iterator[str]:
    entries = [calibration[slot, fmt] for slot in fused if (slot, fmt) in calibration]
    members = ", ".join(fused)
    remedy = "calibrate them together"
    if len({entry.input_amax for entry in entries}) > 1:
        yield f"engines fuse {members}, and input_amax differs; {remedy}"
    has_top_scale = FORMATS[fmt].weight_scaling is WeightScaling.TWO_LEVEL_GROUP
    if has_top_scale and len({entry.weight_amax for entry in entries}) > 1:
        yield f"engines fuse {members}, and weight_amax differs; {remedy}"
    if not _all_equal([entry.pre_quant_scale for entry in entries]):
        yield f"engines fuse {members}, and their AWQ scales differ; {remedy}"


def _all_equal(scales: list[Tensor | None]) -> bool:
    if not scales or scales[0] is None:
        return all(scale is None for scale in scales)
    first = scales[0]
    return all(scale is not None and torch.equal(scale, first) for scale in scales)


def _name_lines(
    model: nn.Module, model_map: ModelMap, slot_formats: _SlotFormats, container: Container
) -> Iterator[str]:
    try:
        names = checkpoint_names(model, model_map)
        formats = names.module_formats(slot_formats)
    except InputError as error:
        yield str(error)
        return
    for slot, fmt in slot_formats.items():
        height = FORMATS[fmt].weight_block_size
        is_in_blocks = FORMATS[fmt].weight_scaling is WeightScaling.BLOCK and height is not None
        for part in names.parts(slot) if is_in_blocks else ():
            if height is not None and part.first_row % height:
                yield (
                    f"{part.module} is written from row {part.first_row} of {slot} on, in the middle "
                    f"of a block of {fmt}; choose another format for it"
                )
    if container is Container.MODELOPT:
        yield from _substring_lines(formats)


def _substring_lines(formats: Mapping[str, FormatName]) -> Iterator[str]:
    left_out = {experts_parent(name) or name for name, fmt in formats.items() if fmt == NONE}
    quantized = "\n".join(name for name, fmt in formats.items() if fmt != NONE)
    for name in sorted(left_out):
        if name in quantized:
            yield (
                f"vLLM leaves out every module whose name contains {name}, which is to stay "
                "unquantised, and quantised ones do; give them one format"
            )


def _modelopt_scale_lines(
    model_map: ModelMap, quantized: _SlotFormats, calibration: Calibrations
) -> Iterator[str]:
    fused = {name for group in model_map.groups for names in group.fusion_sets for name in names}
    for name, fmt in quantized.items():
        entry = calibration.get((name, fmt))
        if entry is None or stored_scale(entry) is None:
            continue
        if not FORMATS[fmt].stores_input_scale:
            yield f"{name} is {fmt}, which no engine reads with an input scale; calibrate it again"
        elif name in fused and not FORMATS[fmt].stores_fused_input_scale:
            yield (
                f"engines fuse {name} with others and take no input scale of {fmt} there, and no "
                "norm can take it; calibrate it again"
            )


def _compressed_tensors_lines(
    model: nn.Module, model_map: ModelMap, quantized: _SlotFormats, calibration: Calibrations
) -> Iterator[str]:
    classes = {type(module).__name__ for module in model.modules()}
    readers = [found for end, found in _WEIGHT_READERS.items() if _any_ends(classes, end)]
    if quantized and _OWN_EXPERTS in classes:
        yield (
            "transformers looks for the experts of Llama 4 one by one in compressed-tensors "
            "checkpoints, and they stay as the model stores them: use --container modelopt"
        )
    yield from _mixed_expert_lines(model_map, quantized)
    for name, fmt in quantized.items():
        advice = _advice(fmt)
        slot = model_map.slots.get(name)
        if slot is None:
            continue
        entry = calibration.get((name, fmt))
        if slot.kind is SlotKind.CONV1D:
            yield f"compressed-tensors has no quantised Conv1D, as {name} is one; {advice}"
        elif slot.kind is SlotKind.EXPERT and fmt not in _EXPERT_FORMATS:
            yield (
                "transformers does not quantise the inputs of fused experts from a "
                "compressed-tensors checkpoint, and unpacks the weights of integer codes alone "
                f"({', '.join(_EXPERT_FORMATS)}): {name}; {advice}"
            )
        elif (family := _reader_of(name, fmt, readers)) is not None:
            yield (
                f"transformers' {family} cannot load packed weights from compressed-tensors: "
                f"{name} as {fmt}; make it fp8, {advice}"
            )
        elif entry is not None and stored_scale(entry) is not None:
            yield (
                f"compressed-tensors has no place for the AWQ scale of {name}, which no norm can "
                f"take; calibrate it without AWQ, {advice}"
            )


def _mixed_expert_lines(model_map: ModelMap, quantized: _SlotFormats) -> Iterator[str]:
    """transformers finds one scheme for the experts of all layers, and loses what is not in it."""
    experts = [name for name, slot in model_map.slots.items() if slot.kind is SlotKind.EXPERT]
    formats = {quantized.get(name, NONE) for name in experts}
    if any(experts_parent(slot.name) for slot in model_map.excluded):
        formats.add(NONE)
    packed = next((name for name in experts if quantized.get(name) in _EXPERT_FORMATS), None)
    if packed is not None and len(formats) > 1:
        yield (
            "transformers unpacks the fused experts of all layers of a compressed-tensors checkpoint "
            f"in one way, so they take one format, got {', '.join(sorted(formats))}: {packed}; give "
            f"them one, or {_advice(quantized[packed])}"
        )


def _advice(fmt: FormatName) -> str:
    """What to do with a layer that compressed-tensors cannot hold in a format."""
    leave = "leave it at none"
    held = (Container.MODELOPT, fmt) in LAYOUTS
    return f"{leave}, or use --container modelopt" if held else leave


def _is_packed(fmt: FormatName) -> bool:
    """Whether compressed-tensors stores something else than one code for each weight."""
    layout = LAYOUTS.get((Container.COMPRESSED_TENSORS, fmt))
    return layout is not None and "weight" not in layout.tensors


def _any_ends(names: Iterable[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _reader_of(
    slot: SlotName, fmt: FormatName, readers: Iterable[tuple[str, str | None]]
) -> str | None:
    """The family whose code in transformers needs the slot's `weight`, which the format lacks."""
    if not _is_packed(fmt):
        return None
    leaf = slot.rpartition(".")[2]
    return next((family for family, only in readers if only in (None, leaf)), None)
