"""What each engine makes of a module's name and the manifest: its own rules, as tables and code.

Read in vLLM 0.33, SGLang 0.5.23, TensorRT-LLM of about 1.2 and transformers 5.23. What is said of
vLLM and SGLang is compared with the answers of their own code (`tests/export/engine_golden`); of
transformers, parsing and matching were run on CPUs; TensorRT-LLM was read only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent, fused_siblings
from autoq.export._manifest_reading import pattern_matcher
from autoq.export.checkup._fp8 import has_other_blocks, is_left_out
from autoq.export.checkup._manifest import FP8_BLOCKS, Declared, Manifest, modelopt_declared
from autoq.export.checkup._modules import StoredModule
from autoq.export.checkup._outcome import GARBAGE, REFUSES, SILENT, UNQUANTIZED
from autoq.formats import Container

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
_NAMES_OF_FUSED_PARTS = frozenset(
    {"deepseek_v2", "deepseek_v3", "gemma2", "gemma3", "gemma3_text", "llama4", "qwen3_moe"}
)
"""Model types whose SGLang classes say what they fuse; for others it looks for the fused name."""

_WITHOUT_ALIAS = (
    "SGLang looks for {fused}, which the manifest lacks, builds the layer unquantised and skips its "
    "scales"
)
_MIXED_WITHOUT_NVFP4 = (
    "SGLang takes a mixed manifest without any NVFP4 layer for that of another method (w4afp8)"
)
_RENAMING_SCALES = frozenset(
    {"internlm3", "llama", "llama4_text", "ministral3", "mistral", "phi3", "teleflm"}
)
"""Model types of SGLang's Llama class, which renames `weight_scale_inv` while it loads: those of
blocks, which are stored so, and of MXFP8, which SGLang has renamed to that itself."""

_OTHER_SCALE = (
    "SGLang's class for Llama and its like renames weight_scale_inv to weight_scale, passes over that "
    "with a warning, and multiplies by scales that nobody has set"
)
_ONE_SCALE_OF_MANY = (
    "SGLang fills one of the global scales that it keeps for {module}, which is stored fused, and "
    "may take another, which nobody has set, without an error"
)


class Fate(StrEnum):
    """What becomes of a module when an engine loads it."""

    QUANTIZED = "quantised"
    UNQUANTIZED = UNQUANTIZED
    SILENT = SILENT
    GARBAGE = GARBAGE
    REFUSED = REFUSES


@dataclass(frozen=True, slots=True)
class Reading:
    """How an engine resolves one module."""

    fate: Fate
    declared: Declared | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Case:
    engine: str
    manifest: Manifest
    modules: Mapping[str, StoredModule]
    module: StoredModule

    @property
    def model_type(self) -> Any:
        """As config.json has it."""
        return self.manifest.config.get("model_type")

    @property
    def fused(self) -> tuple[str, tuple[str, ...]]:
        """The name that the engine looks up, and the modules that it is made of."""
        name = self.module.name
        found = None if experts_parent(name) else fused_siblings(name, self.modules)
        return found or (name, (name,))


def read_as(
    engine: str,
    manifest: Manifest,
    modules: Mapping[str, StoredModule],
    module: StoredModule,
) -> Reading:
    """What `engine` makes of a module.

    Args:
        engine: one of `autoq.formats.ENGINES`.
        modules: all of the checkpoint.
    """
    case = _Case(engine, manifest, modules, module)
    readers = _BY_GROUPS if manifest.container is Container.COMPRESSED_TENSORS else _BY_LAYERS
    try:
        found = _by_exceptions(case) if manifest.is_fp8 else readers[engine](case)
    except ExportError as error:
        return Reading(Fate.REFUSED, reason=str(error))
    if found.fate is Fate.UNQUANTIZED and module.is_quantized:
        return _left_out(case, found.reason)
    if found.fate is Fate.QUANTIZED and not module.is_quantized:
        return Reading(Fate.REFUSED, reason=f"{engine} expects scales that {module.name} lacks")
    return found


def _left_out(case: _Case, reason: str) -> Reading:
    """A quantised module that an engine builds unquantised: vLLM's loader stops at its scales."""
    found = reason or f"{case.engine} resolves {case.fused[0]} to nothing"
    if case.engine == "vllm":
        return Reading(
            Fate.REFUSED, reason=f"{found}, builds it unquantised, and stops at its scales"
        )
    return Reading(Fate.SILENT, reason=f"{found}, and does not say so")


def _nothing(reason: str = "") -> Reading:
    return Reading(Fate.UNQUANTIZED, reason=reason)


def _as(declared: Declared | None) -> Reading:
    return _nothing() if declared is None else Reading(Fate.QUANTIZED, declared)


def _by_exceptions(case: _Case) -> Reading:
    """transformers' own fp8: everything is in blocks but for what the manifest lists."""
    fused, parts = case.fused
    if case.engine == "transformers":  # which fuses nothing
        fused, parts = case.module.name, (case.module.name,)
    ignored = case.manifest.ignored
    if is_left_out(case.engine, fused, ignored):
        return _nothing()
    found = {is_left_out(case.engine, part, ignored) for part in parts}
    if len(found) > 1:
        raise ExportError(f"one part of {fused} is left out, and another is not")
    if found == {True}:
        return _nothing()
    if case.engine == "transformers" and has_other_blocks(case.module):
        reason = f"transformers takes the blocks of {fused} to be as high as its rows / its scales"
        return Reading(Fate.REFUSED, reason=reason)
    if case.engine == "sglang" and case.model_type in _RENAMING_SCALES:
        return Reading(Fate.GARBAGE, reason=_OTHER_SCALE)
    return Reading(Fate.QUANTIZED, FP8_BLOCKS)


def _vllm(case: _Case) -> Reading:
    if _is_excluded(case, _contains):
        return _nothing()
    return _by_algorithm(case, case.manifest.layers)


def _sglang(case: _Case) -> Reading:
    manifest = case.manifest
    if manifest.is_mixed and not manifest.has_nvfp4_layers:
        return Reading(Fate.REFUSED, reason=_MIXED_WITHOUT_NVFP4)
    if _is_excluded(case, _at_a_boundary):
        return _nothing()
    fused, parts = case.fused
    knows_parts = case.model_type in _NAMES_OF_FUSED_PARTS
    if manifest.is_mixed and len(parts) > 1 and fused not in manifest.layers and not knows_parts:
        return _nothing(_WITHOUT_ALIAS.format(fused=fused))
    found = _by_algorithm(case, manifest.layers)
    is_microscaled = found.declared is not None and found.declared.label.upper() == "MXFP8"
    if is_microscaled and not manifest.is_mixed and case.model_type in _RENAMING_SCALES:
        return Reading(Fate.GARBAGE, reason=_OTHER_SCALE)
    is_stored_fused = case.module.name.endswith(("qkv_proj", "gate_up_proj"))
    is_weight_only = found.declared is not None and found.declared.label == "W4A16_NVFP4"
    if is_weight_only and is_stored_fused:
        return Reading(Fate.REFUSED, reason=_ONE_SCALE_OF_MANY.format(module=case.module.name))
    return found


def _tensorrt(case: _Case) -> Reading:
    manifest = case.manifest
    nested = manifest.nested if manifest.nested is not None else {}
    listed = nested.get("exclude_modules")
    excluded = listed if listed and isinstance(listed, list) else manifest.ignored
    if any(fnmatchcase(part, str(entry)) for part in case.fused[1] for entry in excluded):
        return _nothing()
    layers = nested.get("quantized_layers")
    found = _by_algorithm(case, layers if isinstance(layers, Mapping) else manifest.layers)
    leaf = case.module.name.rpartition(".")[2]
    is_awq = found.declared is not None and found.declared.label.endswith("_AWQ")
    is_standing_alone = leaf in ("o_proj", "down_proj") and not experts_parent(case.module.name)
    if is_awq and is_standing_alone and "pre_quant_scale" not in case.module.tensors:
        reason = f"TensorRT-LLM demands a pre_quant_scale of {case.module.name}"
        return Reading(Fate.REFUSED, reason=reason)
    return found


def _by_algorithm(case: _Case, layers: Mapping[str, object]) -> Reading:
    """By the module's entry, or the one algorithm of the checkpoint."""
    if not case.manifest.is_mixed:
        algorithm = case.manifest.algorithm
        if not _knows(case.engine, algorithm, _UNIFORM):
            reason = f"{case.engine} takes no modelopt checkpoint of {algorithm} alone"
            return Reading(Fate.REFUSED, reason=reason)
        return _as(modelopt_declared(case.manifest.flat))
    fused, parts = case.fused
    parent = experts_parent(case.module.name)
    names = [fused] if fused in layers else [*parts, *([parent] if parent else [])]
    entries = [entry for name in names if isinstance(entry := layers.get(name), Mapping)]
    if not entries:
        return _nothing()
    found = {modelopt_declared(entry) for entry in entries}
    if len(found) > 1:
        return Reading(Fate.REFUSED, reason=f"{', '.join(parts)} are fused and differ in format")
    declared = found.pop()
    if not _knows(case.engine, str(entries[0].get("quant_algo")), _PER_LAYER):
        if case.engine == "tensorrt-llm":
            return Reading(Fate.REFUSED, reason=f"TensorRT-LLM knows no {declared.label}")
        return _nothing(f"{case.engine} knows no {declared.label} of single layers")
    return Reading(Fate.QUANTIZED, declared)


def _knows(engine: str, algorithm: str, known: Mapping[str, frozenset[str]]) -> bool:
    """vLLM compares names in capitals, others letter by letter."""
    return (algorithm.upper() if engine == "vllm" else algorithm) in known[engine]


def _is_excluded(case: _Case, matches: Callable[[str, str], bool]) -> bool:
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


def _transformers(case: _Case) -> Reading:
    if not case.module.is_quantized:
        return _nothing()
    weight = case.module.tensors.get("weight")
    if weight is not None and weight.dtype in (torch.float8_e4m3fn, torch.int8):
        return _nothing("transformers loads the codes without their scales and computes nonsense")
    raise ExportError("transformers reads no modelopt checkpoints: packed weights fit no layer")


def _transformers_by_groups(case: _Case) -> Reading:
    return _as(_named_group(case, case.module.name) or _group_for_all(case))


def _vllm_by_groups(case: _Case) -> Reading:
    fused, parts = case.fused
    ignored = pattern_matcher(case.manifest.ignored)
    left_out = [part for part in parts if ignored(part)]
    if left_out and len(left_out) < len(parts):
        raise ExportError(f"{left_out[0]} is ignored, and what it is fused with is not")
    if left_out or ignored(fused):
        return _nothing()
    declared = _named_group(case, fused)
    if declared is None and all(_named_group(case, part) is not None for part in parts):
        # vLLM takes the first part's scheme for all of them, whatever the others have.
        declared = _named_group(case, parts[0])
    declared = declared or _group_for_all(case)
    own = _named_group(case, case.module.name) or _group_for_all(case)
    if own != declared:
        return Reading(Fate.REFUSED, reason=f"{fused} is run by the scheme of {parts[0]}")
    return _as(declared)


def _sglang_by_groups(case: _Case) -> Reading:
    fused, parts = case.fused
    ignored = pattern_matcher(case.manifest.ignored)
    if ignored(fused):
        return _nothing()
    knows_parts = case.model_type in _NAMES_OF_FUSED_PARTS
    declared = _named_group(case, fused) or _group_for_all(case)
    if declared is None and knows_parts:
        found = (_named_group(case, part) for part in parts)
        declared = next((group for group in found if group is not None), None)
    if declared is None and not all(ignored(part) for part in parts if knows_parts):
        raise ExportError(f"SGLang finds {fused} neither in a group nor in ignore, and stops")
    if declared is None and not knows_parts:
        raise ExportError(f"SGLang finds {fused} neither in a group nor in ignore, and stops")
    return _as(declared)


def _named_group(case: _Case, name: str) -> Declared | None:
    """The first group that names a module, or has a pattern for it."""
    if pattern_matcher(case.manifest.ignored)(name):
        return None
    found = (group.declared for group in case.manifest.groups() if group.names(name))
    return next(found, None)


def _group_for_all(case: _Case) -> Declared | None:
    """The group of linears that none names."""
    if pattern_matcher(case.manifest.ignored)(case.module.name):
        return None
    found = (group.declared for group in case.manifest.groups() if group.is_for_all)
    return next(found, None)


def _tensorrt_by_groups(case: _Case) -> Reading:
    return _as(_named_group(case, case.module.name) or _group_for_all(case))


_BY_LAYERS: Mapping[str, Callable[[_Case], Reading]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt,
    "transformers": _transformers,
}
_BY_GROUPS: Mapping[str, Callable[[_Case], Reading]] = {
    "vllm": _vllm_by_groups,
    "sglang": _sglang_by_groups,
    "tensorrt-llm": _tensorrt_by_groups,
    "transformers": _transformers_by_groups,
}
