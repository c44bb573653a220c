"""What a user should know about who can load a checkpoint, before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import nn

from autoq.export._sglang import OTHER_SCALE, RENAMING_SCALES
from autoq.export._types import Spelling
from autoq.formats import (
    ENGINES,
    FORMATS,
    HARDWARE,
    NONE,
    Container,
    Engine,
    FormatName,
    Hardware,
    Target,
    WeightElement,
    all_supports,
    reasons,
)
from autoq.models import ModelMap, SlotKind, SlotName

_FP8, _MXFP8 = FormatName("fp8"), FormatName("mxfp8")
_SlotFormats = Mapping[SlotName, FormatName]


def warnings_for(
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    container: Container,
    storage_dtype: torch.dtype,
    spelling: Spelling = Spelling.OWN,
) -> list[str]:
    """One line for everything a user should know about who can load the result."""
    used = {fmt for fmt in slot_formats.values() if fmt != NONE}
    if not used:
        return []
    lines = [
        *_head_warnings(model, slot_formats),
        *_reader_warnings(used, container),
        *_misfit_warnings(model_map, slot_formats, container),
        *_renaming_warnings(model, used, container, spelling),
    ]
    if container is Container.MODELOPT:
        lines += _modelopt_warnings(model_map, used, slot_formats)
    else:
        lines += _compressed_tensors_warnings(used, storage_dtype)
    return lines


def _head_warnings(model: nn.Module, slot_formats: _SlotFormats) -> Iterator[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    for name, fmt in slot_formats.items():
        if fmt != NONE and head is not None and dict(model.named_modules()).get(name) is head:
            yield f"{name} is quantised ({fmt}): not every engine quantises the output head"


def _reader_warnings(used: set[FormatName], container: Container) -> Iterator[str]:
    """Where formats run that not every engine loads, and whether one place runs them all."""
    narrow = sorted(fmt for fmt in used if not FORMATS[fmt].portable)
    for fmt in narrow:
        places = _places({fmt}, container)
        where = f"loads in {places} only" if places else "loads in no engine; autoq.load runs it"
        yield f"{fmt} in this container {where}"
    if narrow and len(used) > 1:
        names = ", ".join(sorted(used))
        yield (
            f"{names} together load in {places} only"
            if (places := _places(used, container))
            else f"no engine runs {names} of one {container} checkpoint in one place; leave one out"
        )


def _places(formats: set[FormatName], container: Container) -> str:
    """Engines that run all of the formats, with the hardware where they do; empty for none."""
    return "; ".join(
        f"{engine.name} {where}"
        for engine in ENGINES.values()
        if (where := _hardware(engine, formats, container))
    )


def _hardware(engine: Engine, formats: set[FormatName], container: Container) -> str:
    """The generations that run the formats, neighbours as a span."""
    entries = {entry.generation: entry for entry in sorted(HARDWARE.values(), key=_capability)}
    runs = {
        generation: not reasons(Target(engine, entry), container, sorted(formats))
        for generation, entry in entries.items()
    }
    if all(runs.values()):
        return "anywhere"
    spans = [list(generations) for does, generations in groupby(runs, key=runs.__getitem__) if does]
    texts = [span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
    return f"on {', '.join(texts)}" if texts else ""


def _capability(entry: Hardware) -> int:
    return entry.capability or 0


def _modelopt_warnings(
    model_map: ModelMap, used: set[FormatName], slot_formats: _SlotFormats
) -> Iterator[str]:
    yield (
        "transformers cannot read the modelopt container: it fails on packed weights and computes "
        "nonsense from fp8 without a word; use it with vLLM, SGLang or TensorRT-LLM"
    )
    if _quantizes(SlotKind.CONV1D, model_map, slot_formats) and used != {_FP8}:
        yield "of quantised Conv1D layers only fp8 was traced through an engine's loader (vLLM)"


def _compressed_tensors_warnings(
    used: set[FormatName], storage_dtype: torch.dtype
) -> Iterator[str]:
    if _FP8 in used:
        yield "TensorRT-LLM does not read fp8 with one scale per tensor from compressed-tensors"
    fp4 = sorted(fmt for fmt in used if FORMATS[fmt].weight_element is WeightElement.E2M1)
    if fp4 and storage_dtype is not torch.bfloat16:
        name = str(storage_dtype).removeprefix("torch.")
        yield (
            f"transformers runs {', '.join(fp4)} in bfloat16 only, and this model is stored in "
            f"{name}: load it with dtype=torch.bfloat16"
        )


def _misfit_warnings(
    model_map: ModelMap, slot_formats: _SlotFormats, container: Container
) -> Iterator[str]:
    """Layers that an engine does not take in a format that it runs; a line each for the first."""
    used = set(slot_formats.values()) - {NONE}
    entries = {
        (entry.engine, entry.format, entry.out_features_multiple, entry.runs_experts): entry
        for _, entry in all_supports()
        if entry.container is container and entry.format in used
    }
    for _, entry in sorted(entries.items()):
        found: dict[str, list[SlotName]] = {}
        for name, fmt in slot_formats.items():
            slot = model_map.slots[name]
            is_expert = slot.kind is SlotKind.EXPERT
            reason = entry.misfit(slot.out_features, is_expert=is_expert)
            if fmt == entry.format and reason is not None:
                found.setdefault(reason, []).append(name)
        for reason, names in found.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{ENGINES[entry.engine].title} {reason}: {names[0]}{more}"


def _renaming_warnings(
    model: nn.Module, used: set[FormatName], container: Container, spelling: Spelling
) -> Iterator[str]:
    """Of scales that SGLang's Llama class passes over: blocks', and those of MXFP8 alone."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    is_microscaled = container is Container.MODELOPT and used == {_MXFP8}
    if model_type in RENAMING_SCALES and (is_microscaled or spelling is Spelling.TRANSFORMERS_FP8):
        yield f"{OTHER_SCALE}: do not serve {model_type} from this checkpoint with SGLang"


def _quantizes(kind: SlotKind, model_map: ModelMap, slot_formats: _SlotFormats) -> bool:
    return any(
        fmt != NONE and model_map.slots[name].kind is kind for name, fmt in slot_formats.items()
    )
