"""What each engine makes of a module's name and the manifest: its own rules, as tables and code.

Read in vLLM 0.33, SGLang 0.5.23, TensorRT-LLM of about 1.2 and transformers 5.23. What is said of
vLLM and SGLang is compared with the answers of their own code (`tests/export/engine_golden`); of
transformers, parsing and matching were run on CPUs; TensorRT-LLM was read only.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoq.errors import ExportError
from autoq.export._sglang import OTHER_SCALE, RENAMING_SCALES
from autoq.export.checkup._by_groups import BY_GROUPS
from autoq.export.checkup._by_layers import BY_LAYERS
from autoq.export.checkup._case import Case, Fate, Reading, nothing
from autoq.export.checkup._fp8 import has_other_blocks, is_left_out
from autoq.export.checkup._manifest import FP8_BLOCKS, Manifest
from autoq.export.checkup._modules import StoredModule
from autoq.formats import Container

__all__ = ["Fate", "Reading", "read_as"]


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
    case = Case(engine, manifest, modules, module)
    readers = BY_GROUPS if manifest.container is Container.COMPRESSED_TENSORS else BY_LAYERS
    try:
        found = _by_exceptions(case) if manifest.is_fp8 else readers[engine](case)
    except ExportError as error:
        return Reading(Fate.REFUSED, reason=str(error))
    if found.fate is Fate.UNQUANTIZED and module.is_quantized:
        return _left_out(case, found.reason)
    if found.fate is Fate.QUANTIZED and not module.is_quantized:
        return Reading(Fate.REFUSED, reason=f"{engine} expects scales that {module.name} lacks")
    return found


def _left_out(case: Case, reason: str) -> Reading:
    """A quantised module that an engine builds unquantised: vLLM's loader stops at its scales."""
    found = reason or f"{case.engine} resolves {case.fused[0]} to nothing"
    if case.engine == "vllm":
        return Reading(
            Fate.REFUSED, reason=f"{found}, builds it unquantised, and stops at its scales"
        )
    return Reading(Fate.SILENT, reason=f"{found}, and does not say so")


def _by_exceptions(case: Case) -> Reading:
    """transformers' own fp8: everything is in blocks but for what the manifest lists."""
    fused, parts = case.fused
    if case.engine == "transformers":  # which fuses nothing
        fused, parts = case.module.name, (case.module.name,)
    ignored = case.manifest.ignored
    if is_left_out(case.engine, fused, ignored):
        return nothing()
    found = {is_left_out(case.engine, part, ignored) for part in parts}
    if len(found) > 1:
        raise ExportError(f"one part of {fused} is left out, and another is not")
    if found == {True}:
        return nothing()
    if case.engine == "transformers" and has_other_blocks(case.module):
        reason = f"transformers takes the blocks of {fused} to be as high as its rows / its scales"
        return Reading(Fate.REFUSED, reason=reason)
    if case.engine == "sglang" and case.model_type in RENAMING_SCALES:
        return Reading(Fate.GARBAGE, reason=OTHER_SCALE)
    return Reading(Fate.QUANTIZED, FP8_BLOCKS)
