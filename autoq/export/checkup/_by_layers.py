"""How each engine reads modelopt's manifests, which name layers or one algorithm for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent
from autoq.export._sglang import NAMES_OF_FUSED_PARTS, OTHER_SCALE, RENAMING_SCALES
from autoq.export.checkup._case import Case, Fate, Reading, as_declared, nothing
from autoq.export.checkup._manifest import modelopt_declared

_SHARED_ALGORITHMS = frozenset({"FP8", "FP8_PB_WO", "MXFP8", "NVFP4", "W4A16_NVFP4"})
_PER_LAYER: Mapping[str, frozenset[str]] = {
    "vllm": _SHARED_ALGORITHMS | {"FP8_PER_CHANNEL_PER_TOKEN"},
    "sglang": _SHARED_ALGORITHMS | {"FP8_BLOCK_SCALES"},
    "tensorrt-llm": frozenset(
        {
            "FP8",
            "FP8_BLOCK_SCALES",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "NVFP4",
            "W4A16_AWQ",
            "W4A8_AWQ",
        }
    ),
}
_UNIFORM: Mapping[str, frozenset[str]] = {
    "vllm": _PER_LAYER["vllm"],
    "sglang": frozenset({"FP8", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"}),
    "tensorrt-llm": _PER_LAYER["tensorrt-llm"] | {"fp8_pb_wo", "W4A8_NVFP4_FP8"},
}
_WITHOUT_ALIAS = (
    "SGLang looks for {fused}, which the manifest lacks, builds the layer unquantised and skips its "
    "scales"
)
_MIXED_WITHOUT_NVFP4 = (
    "SGLang takes a mixed manifest without any NVFP4 layer for that of another method (w4afp8)"
)
_ONE_SCALE_OF_MANY = (
    "SGLang fills one of the global scales that it keeps for {module}, which is stored fused, and "
    "may take another, which nobody has set, without an error"
)


def _vllm(case: Case) -> Reading:
    if _is_excluded(case, _contains):
        return nothing()
    return _by_algorithm(case, case.manifest.layers)


def _sglang(case: Case) -> Reading:
    manifest = case.manifest
    if manifest.is_mixed and not manifest.has_nvfp4_layers:
        return Reading(Fate.REFUSED, reason=_MIXED_WITHOUT_NVFP4)
    if _is_excluded(case, _at_a_boundary):
        return nothing()
    fused, parts = case.fused
    knows_parts = case.model_type in NAMES_OF_FUSED_PARTS
    if manifest.is_mixed and len(parts) > 1 and fused not in manifest.layers and not knows_parts:
        return nothing(_WITHOUT_ALIAS.format(fused=fused))
    found = _by_algorithm(case, manifest.layers)
    is_microscaled = found.declared is not None and found.declared.label.upper() == "MXFP8"
    if is_microscaled and not manifest.is_mixed and case.model_type in RENAMING_SCALES:
        return Reading(Fate.GARBAGE, reason=OTHER_SCALE)
    is_stored_fused = case.module.name.endswith(("qkv_proj", "gate_up_proj"))
    is_weight_only = found.declared is not None and found.declared.label == "W4A16_NVFP4"
    if is_weight_only and is_stored_fused:
        return Reading(Fate.REFUSED, reason=_ONE_SCALE_OF_MANY.format(module=case.module.name))
    return found


def _tensorrt(case: Case) -> Reading:
    manifest = case.manifest
    nested = manifest.nested if manifest.nested is not None else {}
    listed = nested.get("exclude_modules")
    excluded = listed if listed and isinstance(listed, list) else manifest.ignored
    if any(fnmatchcase(part, str(entry)) for part in case.fused[1] for entry in excluded):
        return nothing()
    layers = nested.get("quantized_layers")
    found = _by_algorithm(case, layers if isinstance(layers, Mapping) else manifest.layers)
    leaf = case.module.name.rpartition(".")[2]
    is_awq = found.declared is not None and found.declared.label.endswith("_AWQ")
    is_standing_alone = leaf in ("o_proj", "down_proj") and not experts_parent(case.module.name)
    if is_awq and is_standing_alone and "pre_quant_scale" not in case.module.tensors:
        reason = f"TensorRT-LLM demands a pre_quant_scale of {case.module.name}"
        return Reading(Fate.REFUSED, reason=reason)
    return found


def _by_algorithm(case: Case, layers: Mapping[str, object]) -> Reading:
    """By the module's entry, or the one algorithm of the checkpoint."""
    if not case.manifest.is_mixed:
        algorithm = case.manifest.algorithm
        if not _knows(case.engine, algorithm, _UNIFORM):
            reason = f"{case.engine} takes no modelopt checkpoint of {algorithm} alone"
            return Reading(Fate.REFUSED, reason=reason)
        return as_declared(modelopt_declared(case.manifest.flat))
    fused, parts = case.fused
    parent = experts_parent(case.module.name)
    names = [fused] if fused in layers else [*parts, *([parent] if parent else [])]
    entries = [entry for name in names if isinstance(entry := layers.get(name), Mapping)]
    if not entries:
        return nothing()
    found = {modelopt_declared(entry) for entry in entries}
    if len(found) > 1:
        return Reading(Fate.REFUSED, reason=f"{', '.join(parts)} are fused and differ in format")
    declared = found.pop()
    if not _knows(case.engine, str(entries[0].get("quant_algo")), _PER_LAYER):
        if case.engine == "tensorrt-llm":
            return Reading(Fate.REFUSED, reason=f"TensorRT-LLM knows no {declared.label}")
        return nothing(f"{case.engine} knows no {declared.label} of single layers")
    return Reading(Fate.QUANTIZED, declared)


def _knows(engine: str, algorithm: str, known: Mapping[str, frozenset[str]]) -> bool:
    """vLLM compares names in capitals, others letter by letter."""
    return (algorithm.upper() if engine == "vllm" else algorithm) in known[engine]


def _is_excluded(case: Case, matches: Callable[[str, str], bool]) -> bool:
    """
    Raises:
        ExportError: some parts of a fused module are, and others are not.
    """
    parts = case.fused[1]
    excluded = [
        part for part in parts if any(matches(part, entry) for entry in case.manifest.ignored)
    ]
    if excluded and len(excluded) < len(parts):
        raise ExportError(f"{excluded[0]} is excluded, and what it is fused with is not")
    return bool(excluded)


def _contains(module: str, entry: str) -> bool:
    """vLLM: equal, part of the name, or a shell pattern; X* counts as X, too."""
    if entry.endswith("*") and entry[:-1] and entry[:-1] in module:
        return True
    return entry in module or fnmatchcase(module, entry)


def _at_a_boundary(module: str, entry: str) -> bool:
    """SGLang: whole components, or a shell pattern for the whole name or one component."""
    if f".{entry}." in f".{module}.":
        return True
    return any(fnmatchcase(name, entry) for name in (module, *module.split(".")))


def _transformers(case: Case) -> Reading:
    if not case.module.is_quantized:
        return nothing()
    weight = case.module.tensors.get("weight")
    if weight is not None and weight.dtype in (torch.float8_e4m3fn, torch.int8):
        return nothing("transformers loads the codes without their scales and computes nonsense")
    raise ExportError("transformers reads no modelopt checkpoints: packed weights fit no layer")


BY_LAYERS: Mapping[str, Callable[[Case], Reading]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt,
    "transformers": _transformers,
}
