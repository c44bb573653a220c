"""A plan's tensors, split over the ranks of TensorRT-LLM's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoq.export._folding import stored_scale
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_families import (
    BLOCK_NORMS,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    KV_SCALE,
    ROUTER,
    EngineLinear,
    Fused,
)
from autoq.export._tensorrt_llm_layouts import ENGINE_LAYOUTS, NORM_SCALE, WHOLE, stored_input_scale
from autoq.export._tensorrt_llm_names import (
    Parallel,
    family_of,
    head_size,
    key_value_heads,
    layer_count,
    layer_path,
    model_linears,
)
from autoq.export._tensorrt_llm_plain import (
    RankTensors,
    add,
    add_head_bias,
    add_norm,
    add_one,
    add_positions,
    vocabulary,
)
from autoq.formats import NONE, FormatName
from autoq.layers.kv_cache import cache_scale
from autoq.models import SlotName


def linears(plan: ExportPlan) -> Iterator[tuple[int, EngineLinear, list[SlotName]]]:
    """Layer, linear of the engine, and the slots in it."""
    for layer in range(layer_count(plan.model)):
        for linear in model_linears(plan.model):
            yield layer, linear, [_slot_name(plan, layer, part) for part in linear.parts]


def linear_format(plan: ExportPlan, layer: int, linear: EngineLinear) -> FormatName:
    """Format of the engine's linear, which is that of all its parts."""
    return plan.slot_formats.get(_slot_name(plan, layer, linear.parts[0]), NONE)


def _slot_name(plan: ExportPlan, layer: int, part: str) -> SlotName:
    return SlotName(f"{layer_path(plan.model, layer)}.{part}")


def stage_tensors(
    plan: ExportPlan, parallel: Parallel, stage: int, progress: Callable[[], None]
) -> RankTensors:
    """All tensors of the ranks of one stage, in memory."""
    ranks: RankTensors = [{} for _ in range(parallel.tensor)]
    size = layer_count(plan.model) // parallel.pipeline
    if stage == 0:
        add(ranks, f"{EMBEDDING}.weight", vocabulary(plan, "input", parallel))
        add_positions(ranks, plan, parallel)
    for number in range(size):
        _add_layer(ranks, plan, parallel, stage * size + number, f"transformer.layers.{number}")
        progress()
    if stage == parallel.pipeline - 1:
        add_norm(ranks, plan, family_of(plan.model).final_norm, FINAL_NORM)
        add(ranks, f"{HEAD}.weight", vocabulary(plan, "output", parallel))
        add_head_bias(ranks, plan, parallel)
    return ranks


def _add_layer(
    ranks: RankTensors, plan: ExportPlan, parallel: Parallel, layer: int, prefix: str
) -> None:
    model_prefix, family = layer_path(plan.model, layer), family_of(plan.model)
    for linear in model_linears(plan.model):
        fmt = linear_format(plan, layer, linear)
        parts = [_logical(plan, SlotName(f"{model_prefix}.{part}")) for part in linear.parts]
        weights = _pieces(plan, linear, parts)
        for rank, tensors in enumerate(ranks):
            share = stacked_share if linear.is_stacked else _of_rank
            held = share(weights, linear.splits_rows, rank, parallel.tensor)
            add_one(tensors, f"{prefix}.{linear.name}", _packed(fmt, held, linear))
        _add_input_scales(
            ranks, plan, SlotName(f"{model_prefix}.{linear.parts[0]}"), linear, prefix
        )
        _add_bias(ranks, plan, model_prefix, linear, prefix)
    if family.has_experts:
        router = plan.model.get_parameter(f"{model_prefix}.{family.router}.weight").detach()
        add(ranks, f"{prefix}.{ROUTER}.weight", [router.float()] * parallel.tensor)
    kv_scale = cache_scale_of(plan, layer)
    if kv_scale is not None:
        add(ranks, f"{prefix}.{KV_SCALE}", [kv_scale] * parallel.tensor)
    for engine, name in family.norms.items():
        add_norm(ranks, plan, f"{model_prefix}.{name}", f"{prefix}.{engine}")
        if engine in BLOCK_NORMS and _has_norm_scales(plan, layer):
            add(ranks, f"{prefix}.{engine}.{NORM_SCALE}", [torch.ones(1)] * parallel.tensor)


def cache_scale_of(plan: ExportPlan, layer: int) -> Tensor | None:
    """The scale of a layer's keys and values, float32 [1]; None where the cache is as it is.

    The engine has one for both: that of the larger magnitudes, under which neither saturates.
    """
    if plan.kv_cache is None or plan.cache_format == NONE:
        return None
    prefix = f"{layer_path(plan.model, layer)}."
    (cached,) = (one for one in plan.kv_cache.layers if one.name.startswith(prefix))
    largest = max(cached.key_amax, cached.value_amax)
    return cache_scale(plan.cache_format, largest).reshape(1)


def _pieces(
    plan: ExportPlan, linear: EngineLinear, parts: Sequence[Mapping[str, Tensor]]
) -> Sequence[Mapping[str, Tensor]]:
    """The matrices of a linear in the engine's order, each of which ranks share on its own."""
    if linear.fused is None:
        return parts
    (whole,) = parts
    split = {name: _split_rows(plan, linear, tensor) for name, tensor in whole.items()}
    count = max(len(tensors) for tensors in split.values())
    return [
        {name: tensors[number % len(tensors)] for name, tensors in split.items()}
        for number in range(count)
    ]


def _split_rows(plan: ExportPlan, linear: EngineLinear, tensor: Tensor) -> Sequence[Tensor]:
    """Rows of a matrix or a bias that the model has fused; what is no row stays one."""
    if tensor.ndim == 0:
        return [tensor]
    if linear.fused is Fused.GATE_UP:
        gate, up = tensor.chunk(2)
        return [up, gate]
    config: Any = plan.model.config
    size, shared = head_size(config), key_value_heads(config)
    if linear.fused is Fused.HEADS:
        by_head = tensor.reshape(-1, 3, size, *tensor.shape[1:])
        return [by_head[:, part].flatten(0, 1) for part in range(3)]
    rows = [config.num_attention_heads * size, shared * size, shared * size]
    return torch.split(tensor, rows)


def _packed(
    fmt: FormatName, held: Mapping[str, Tensor], linear: EngineLinear
) -> Mapping[str, Tensor]:
    if fmt == NONE:
        return held
    layout = ENGINE_LAYOUTS[fmt]
    pack = layout.pack_experts if linear.is_stacked else layout.pack
    assert pack is not None  # refused before
    return pack(held)


def _has_norm_scales(plan: ExportPlan, layer: int) -> bool:
    fmt = linear_format(plan, layer, model_linears(plan.model)[0])
    return fmt != NONE and ENGINE_LAYOUTS[fmt].input_divisor is not None


def _logical(plan: ExportPlan, name: SlotName) -> Mapping[str, Tensor]:
    """Codes and scales of a slot, or its weight where it has none."""
    if plan.slot_formats.get(name, NONE) != NONE:
        return plan.quantize(plan.model_map.slots[name]).tensors
    return {"weight": original_weight(plan.model, name).to(plan.scale_dtype)}


def original_weight(model: nn.Module, name: SlotName) -> Tensor:
    """The model's matrix [out_features, in_features], of slots that a search left out, too."""
    path, marker, expert = name.partition(".experts.")
    if not marker:
        weight = model.get_parameter(f"{name}.weight").detach()
        is_transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
        return weight.t() if is_transposed else weight
    number, parameter = expert.split(".")
    return model.get_parameter(f"{path}.experts.{parameter}").detach()[int(number)]


def _of_rank(
    parts: Sequence[Mapping[str, Tensor]], splits_rows: bool, rank: int, ranks: int
) -> dict[str, Tensor]:
    """A rank's share of each part, one above the other; scalars are the first part's."""
    held = {}
    for name, first in parts[0].items():
        if first.ndim < 2:
            held[name] = first
            continue
        shares = [_share(name, part[name], splits_rows, rank, ranks) for part in parts]
        held[name] = torch.cat(shares)
    return held


def stacked_share(
    experts: Sequence[Mapping[str, Tensor]], splits_rows: bool, rank: int, ranks: int
) -> dict[str, Tensor]:
    """A rank's share of every expert, one behind the other; up is before gate."""
    held = {}
    for name, first in experts[0].items():
        tensors = [expert[name] for expert in experts]
        if first.ndim == 2 and splits_rows:
            halves = [tensor.chunk(2) for tensor in tensors]
            tensors = [
                torch.cat([up.chunk(ranks)[rank], gate.chunk(ranks)[rank]]) for gate, up in halves
            ]
        elif first.ndim == 2:
            tensors = [_share(name, tensor, splits_rows, rank, ranks) for tensor in tensors]
        held[name] = torch.stack(tensors)
    return held


def _share(name: str, matrix: Tensor, splits_rows: bool, rank: int, ranks: int) -> Tensor:
    """Rows or columns of codes, or of scales that stand in the same order; scales of rows whole."""
    if splits_rows:
        return matrix.chunk(ranks, 0)[rank]
    return matrix if name in WHOLE else matrix.chunk(ranks, 1)[rank]


def _add_input_scales(
    ranks: RankTensors, plan: ExportPlan, name: SlotName, linear: EngineLinear, prefix: str
) -> None:
    fmt = plan.slot_formats.get(name, NONE)
    if fmt == NONE:
        return
    layout, slot = ENGINE_LAYOUTS[fmt], plan.model_map.slots[name]
    entry, count = plan.entry(slot), len(ranks)
    path = f"{prefix}.{linear.name}"
    scale = stored_input_scale(fmt, entry)
    if scale is not None:
        add(ranks, f"{path}.{layout.input_scaling}", [scale] * count)
    stored = stored_scale(entry)
    columns = torch.ones(slot.in_features) if stored is None else stored.float().cpu()
    shares = [columns] * count if linear.splits_rows else list(columns.chunk(count))
    if layout.input_multiplier is not None:
        typed = [share.to(plan.scale_dtype) for share in shares]
        add(ranks, f"{path}.{layout.input_multiplier}", typed)
    if layout.input_divisor is not None and not linear.splits_rows:
        # Exact: the scales are powers of two.
        divisors = [share.reciprocal().reshape(1, -1) for share in shares]
        add(ranks, f"{path}.{layout.input_divisor}", divisors)


def _add_bias(
    ranks: RankTensors, plan: ExportPlan, model_prefix: str, linear: EngineLinear, prefix: str
) -> None:
    if linear.is_stacked:
        return
    modules = [plan.model.get_submodule(f"{model_prefix}.{part}") for part in linear.parts]
    biases = [module.bias for module in modules if isinstance(module.bias, Tensor)]
    if not biases:
        return
    typed = [bias.detach().to(plan.scale_dtype) for bias in biases]
    if linear.fused is not None:
        typed = list(_split_rows(plan, linear, typed[0]))
    count = len(ranks)
    for rank, tensors in enumerate(ranks):
        # What a bias adds to the sum of all ranks is added once, by most of the engine's models.
        shares = [bias.chunk(count)[rank] if linear.splits_rows else bias for bias in typed]
        if rank > 0 and not linear.splits_rows and family_of(plan.model).adds_up_biases:
            shares = [torch.zeros_like(bias) for bias in typed]
        add_one(tensors, f"{prefix}.{linear.name}", {"bias": torch.cat(shares)})
