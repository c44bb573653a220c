"""How each engine reads compressed-tensors' manifests, whose groups name what they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autoq.errors import ExportError
from autoq.export._manifest_reading import pattern_matcher
from autoq.export._sglang import NAMES_OF_FUSED_PARTS
from autoq.export.checkup._case import Case, Fate, Reading, as_declared, nothing
from autoq.export.checkup._manifest import Declared


def _transformers_by_groups(case: Case) -> Reading:
    return as_declared(_named_group(case, case.module.name) or _group_for_all(case))


def _vllm_by_groups(case: Case) -> Reading:
    fused, parts = case.fused
    ignored = pattern_matcher(case.manifest.ignored)
    left_out = [part for part in parts if ignored(part)]
    if left_out and len(left_out) < len(parts):
        raise ExportError(f"{left_out[0]} is ignored, and what it is fused with is not")
    if left_out or ignored(fused):
        return nothing()
    declared = _named_group(case, fused)
    if declared is None and all(_named_group(case, part) is not None for part in parts):
        # vLLM takes the first part's scheme for all of them, whatever the others have.
        declared = _named_group(case, parts[0])
    declared = declared or _group_for_all(case)
    own = _named_group(case, case.module.name) or _group_for_all(case)
    if own != declared:
        return Reading(Fate.REFUSED, reason=f"{fused} is run by the scheme of {parts[0]}")
    return as_declared(declared)


def _sglang_by_groups(case: Case) -> Reading:
    fused, parts = case.fused
    ignored = pattern_matcher(case.manifest.ignored)
    if ignored(fused):
        return nothing()
    knows_parts = case.model_type in NAMES_OF_FUSED_PARTS
    declared = _named_group(case, fused) or _group_for_all(case)
    if declared is None and knows_parts:
        found = (_named_group(case, part) for part in parts)
        declared = next((group for group in found if group is not None), None)
    if declared is None and not all(ignored(part) for part in parts if knows_parts):
        raise ExportError(f"SGLang finds {fused} neither in a group nor in ignore, and stops")
    if declared is None and not knows_parts:
        raise ExportError(f"SGLang finds {fused} neither in a group nor in ignore, and stops")
    return as_declared(declared)


def _named_group(case: Case, name: str) -> Declared | None:
    """The first group that names a module, or has a pattern for it."""
    if pattern_matcher(case.manifest.ignored)(name):
        return None
    found = (group.declared for group in case.manifest.groups() if group.names(name))
    return next(found, None)


def _group_for_all(case: Case) -> Declared | None:
    """The group of linears that none names."""
    if pattern_matcher(case.manifest.ignored)(case.module.name):
        return None
    found = (group.declared for group in case.manifest.groups() if group.is_for_all)
    return next(found, None)


def _tensorrt_by_groups(case: Case) -> Reading:
    return as_declared(_named_group(case, case.module.name) or _group_for_all(case))


BY_GROUPS: Mapping[str, Callable[[Case], Reading]] = {
    "vllm": _vllm_by_groups,
    "sglang": _sglang_by_groups,
    "tensorrt-llm": _tensorrt_by_groups,
    "transformers": _transformers_by_groups,
}
