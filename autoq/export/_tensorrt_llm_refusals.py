"""What TensorRT-LLM's engine checkpoints cannot hold, said before work, and what to know of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autoq.errors import ExportError
from autoq.export._folding import folded_scales, folding_refusals, stored_scale
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_config import approximates_gelu
from autoq.export._tensorrt_llm_families import FAMILIES, EngineLinear
from autoq.export._tensorrt_llm_layouts import CACHES, ENGINE_LAYOUTS, engine_refusals
from autoq.export._tensorrt_llm_names import (
    Parallel,
    attention_windows,
    family_of,
    layer_count,
    model_refusals,
)
from autoq.export._tensorrt_llm_ranks import linear_format, linears
from autoq.formats import FORMATS, NONE, FormatName, WeightScaling
from autoq.layers import Container, LayerCalibration
from autoq.models import SlotName

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""The dtypes that the engine runs quantised layers in, by the names in config.json."""

_NOT_RUN = (
    "the checkpoint follows TensorRT-LLM's sources and is read back here, and no engine of "
    "TensorRT-LLM has been built of one yet: compare the engine's answers with the model's"
)


def refuse_tensorrt_llm(plan: ExportPlan, parallel: Parallel) -> None:
    """Refuse a plan that the checkpoint cannot hold.

    Raises:
        ExportError: says the first thing that it cannot hold.
    """
    lines = tensorrt_llm_refusals(plan, parallel)
    if lines:
        more = f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else ""
        raise ExportError(f"{lines[0]}{more}")


def tensorrt_llm_refusals(plan: ExportPlan, parallel: Parallel) -> list[str]:
    """Everything that keeps the plan from being written, a line each, by name."""
    lines = list(model_refusals(plan.model, parallel))
    if lines:
        return lines
    if plan.scale_dtype not in DTYPES:
        lines.append(
            "tensorrt-llm checkpoints are written in float16 or bfloat16, and the model's dtype is "
            f"{str(plan.scale_dtype).removeprefix('torch.')}; save the model in one of them"
        )
    found = list(linears(plan))
    known = {name for _, _, names in found for name in names}
    lines += [
        f"{slot.name} cannot be quantised in tensorrt-llm, which has only the linears of layers "
        "quantised; bind it to none"
        for slot in plan.quantized_slots
        if slot.name not in known
    ]
    lines += engine_refusals(linear_format(plan, layer, linear) for layer, linear, _ in found)
    lines += _cache_lines(plan)
    if lines:
        return lines
    for layer, linear, names in found:
        lines += _linear_lines(plan, parallel, linear, names, linear_format(plan, layer, linear))
    quantized = {slot.name: plan.slot_formats[slot.name] for slot in plan.quantized_slots}
    lines += folding_refusals(plan.model, plan.model_map, quantized, plan.calibration)
    return [*lines, *_stage_lines(plan, parallel), *_attention_lines(plan)]


def tensorrt_llm_warnings(plan: ExportPlan) -> list[str]:
    """What a user should know about the result before it is written, a line each."""
    lines = [_NOT_RUN]
    used = {plan.slot_formats[slot.name] for slot in plan.quantized_slots}
    if "w4a8_awq" in used and plan.container is not Container.MODELOPT:
        lines.append(
            f"w4a8_awq was scored as {plan.container.value} computes it; TensorRT-LLM scales its "
            "inputs by a constant and rounds its weights to FP8: search with --container modelopt "
            "to score that"
        )
    lines += _cache_warnings(plan)
    if approximates_gelu(plan.model):
        lines.append(
            "the model's gelu is exact, and TensorRT-LLM's is the approximation by tanh, which differs "
            "from it by up to 5e-4 at every activation: compare the engine's answers with the model's"
        )
    windows = attention_windows(plan.model)
    if windows:
        said = " ".join(str(window) for window in windows)
        lines.append(
            f"the model's attention looks back {min(windows)} tokens, which the checkpoint cannot "
            f"say: give the runtime max_attention_window_size {said}"
        )
    return lines


def _cache_lines(plan: ExportPlan) -> Iterator[str]:
    """Why the checkpoint cannot hold the plan's key/value cache."""
    if plan.kv_cache is None:
        return
    formats = sorted(set(plan.kv_cache.formats.values()))
    held = ", ".join(CACHES)
    if len(formats) > 1:
        yield (
            "tensorrt-llm checkpoints state one format of the key/value cache for all layers, and this "
            f"plan has {', '.join(formats)}; search with --kv-scope model"
        )
    elif formats and formats[0] != NONE and formats[0] not in CACHES:
        yield (
            f"tensorrt-llm's engine checkpoints hold no key/value cache in {formats[0]}; formats that "
            f"they can hold: {held}"
        )
    elif plan.cache_format != NONE and not family_of(plan.model).quantizes_cache:
        yield (
            f"TensorRT-LLM's {type(plan.model).__name__} does not tell its attention of a quantised "
            "key/value cache; search without --kv-formats"
        )


def _cache_warnings(plan: ExportPlan) -> Iterator[str]:
    """The engine has one scale for a layer's keys and values, and the search had two."""
    if plan.kv_cache is None or plan.cache_format == NONE:
        return
    ratios = {
        layer.name: max(pair) / min(pair)
        for layer in plan.kv_cache.layers
        if min(pair := (layer.key_amax, layer.value_amax)) > 0
    }
    worst = max(ratios, key=lambda name: ratios[name], default=None)
    if worst is not None and ratios[worst] > 1:
        yield (
            "the engine has one scale for a layer's keys and values, the larger of the two that were "
            f"scored; they differ most in {worst}, by a factor of {ratios[worst]:.3g}"
        )


def _linear_lines(
    plan: ExportPlan,
    parallel: Parallel,
    linear: EngineLinear,
    names: list[SlotName],
    fmt: FormatName,
) -> Iterator[str]:
    formats = [plan.slot_formats.get(name, NONE) for name in names]
    if len(set(formats)) > 1:
        yield (
            f"the engine runs {', '.join(names)} as one matrix of one format, got "
            f"{', '.join(formats)}; choose one"
        )
        return
    if fmt == NONE:
        return
    missing = [name for name in names if (name, fmt) not in plan.calibration]
    if missing:
        yield f"{missing[0]} has no calibration for {fmt}; calibrate it first"
        return
    if linear.is_stacked and ENGINE_LAYOUTS[fmt].pack_experts is None:
        able = ", ".join(key for key, layout in ENGINE_LAYOUTS.items() if layout.pack_experts)
        yield (
            f"{names[0]} cannot be {fmt} in tensorrt-llm: how experts are stored in it is not known "
            f"to autoq; experts can be {able}"
        )
        return
    entries = [plan.calibration[name, fmt] for name in names]
    if linear.is_stacked and any(entry.pre_quant_scale is not None for entry in entries):
        yield (
            f"the router reads what the experts read, so that no norm can take an input scale of "
            f"{names[0]}; calibrate it again, or choose another format"
        )
        return
    yield from _shared_lines(names, fmt, entries, one_matrix=not linear.is_stacked)
    if stored_scale(entries[0]) is not None and not _takes_scale(fmt, linear):
        yield (
            f"tensorrt-llm has no place for the input scale of {names[0]} in {fmt}, which no norm "
            "can take; calibrate it again, or choose another format"
        )
    for name in names:
        yield from _size_lines(plan, parallel, linear, name, fmt)


def _takes_scale(fmt: FormatName, linear: EngineLinear) -> bool:
    layout = ENGINE_LAYOUTS[fmt]
    return layout.input_multiplier is not None or (
        layout.input_divisor is not None and not linear.splits_rows
    )


def _shared_lines(
    names: list[SlotName], fmt: FormatName, entries: list[LayerCalibration], *, one_matrix: bool
) -> Iterator[str]:
    first, members = entries[0], ", ".join(names)
    scaling = FORMATS[fmt].weight_scaling
    has_top_scale = one_matrix and scaling in (
        WeightScaling.TENSOR,
        WeightScaling.TWO_LEVEL_GROUP,
    )
    for entry in entries[1:]:
        if has_top_scale and entry.weight_amax != first.weight_amax:
            yield f"the engine fuses {members}, and weight_amax differs; calibrate them together"
        if entry.input_amax != first.input_amax:
            yield f"the engine fuses {members}, and input_amax differs; calibrate them together"
        one, other = first.pre_quant_scale, entry.pre_quant_scale
        is_same = one is other or (
            one is not None and other is not None and torch.equal(one, other)
        )
        if not is_same or entry.folds_into != first.folds_into:
            yield f"the engine fuses {members}, and their input scales differ; calibrate them anew"


def _size_lines(
    plan: ExportPlan, parallel: Parallel, linear: EngineLinear, name: SlotName, fmt: FormatName
) -> Iterator[str]:
    slot = plan.model_map.slots[name]
    rows, columns = slot.out_features, slot.in_features
    if linear.splits_rows:
        rows //= parallel.tensor
    else:
        columns //= parallel.tensor
    block = FORMATS[fmt].weight_block_size
    if block is not None and columns % block:
        yield (
            f"a rank's inputs of {name} must be a multiple of {fmt}'s block of {block}, and with "
            f"tp_size {parallel.tensor} they are {columns}; choose a smaller tp_size or another "
            "format"
        )
    if FORMATS[fmt].rows_per_byte == 2 and rows % 2:
        yield (
            f"a rank's outputs of {name} must be even in {fmt}, and with tp_size "
            f"{parallel.tensor} they are {rows}; choose another"
        )


def _stage_lines(plan: ExportPlan, parallel: Parallel) -> Iterator[str]:
    """Layers are numbered anew in every stage, and the formats are said once for all."""
    size = layer_count(plan.model) // parallel.pipeline
    for layer, linear, _ in linears(plan):
        here = linear_format(plan, layer, linear)
        first = linear_format(plan, layer % size, linear)
        if here != first:
            yield (
                "tensorrt-llm names layers anew in each pipeline stage, so that all stages have the "
                f"formats of the first, and {linear.name} is {here} in layer {layer} and {first} in "
                f"layer {layer % size}; choose pp_size 1"
            )
            return


def _attention_lines(plan: ExportPlan) -> Iterator[str]:
    architecture, family = type(plan.model).__name__, family_of(plan.model)
    used = {plan.slot_formats[slot.name] for slot in plan.quantized_slots}
    whole = sorted(fmt for fmt in used if ENGINE_LAYOUTS[fmt].everywhere)
    if whole and family.normalises_heads:
        yield (
            f"tensorrt-llm's attention in {whole[0]} does not normalise queries and keys, as "
            f"{architecture} does; choose another format"
        )
    elif whole and whole[0] not in family.whole_formats:
        able = ", ".join(name for name, one in FAMILIES.items() if whole[0] in one.whole_formats)
        yield (
            f"tensorrt-llm's layers of {architecture} in {whole[0]} are not known to autoq, those of "
            f"{able} are; choose another format"
        )
    folded = folded_scales(plan.slot_formats, plan.calibration)
    if folded and family.adds_one:
        yield (
            f"the engine stores the norms of {architecture} with one added, so that none takes an "
            f"input scale, and {min(folded)} has one; calibrate it again"
        )
