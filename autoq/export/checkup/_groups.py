"""What is wrong with the patterns of a compressed-tensors manifest: those that are for nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from autoq.export._aliases import experts_parent, fused_siblings
from autoq.export._compressed_tensors_manifest import KEPT_EXPERTS
from autoq.export._manifest_reading import pattern_matcher
from autoq.export.checkup._manifest import Manifest
from autoq.export.checkup._modules import StoredModule

_PATTERN = "re:"
_OFTEN_ABSENT = ("lm_head", "model.lm_head", "output")
"""Heads, which manifests leave out whether or not the checkpoint has one of its own."""


def pattern_faults(
    manifest: Manifest, names: Iterable[str], modules: Mapping[str, StoredModule]
) -> Iterator[str]:
    """Regular expressions that match no module, a line each.

    Args:
        names: of all tensors, whose modules patterns may leave out, linear or not.
    """
    linear = _with_what_engines_fuse(modules)
    for target in manifest.targets:
        is_pattern = target.startswith(_PATTERN) and target != KEPT_EXPERTS
        if is_pattern and not _matches_any(target, linear):
            yield f"a config group is for {target!r}, which matches no linear module: it is for nobody"
    everything = {*linear, *_OFTEN_ABSENT, *_prefixes(names)}
    for entry in manifest.ignored:
        if entry.startswith(_PATTERN) and not _matches_any(entry, everything):
            yield f"ignore has {entry!r}, which matches no module: what it is for is not left out"


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    matches = pattern_matcher([pattern])
    return any(matches(name) for name in names)


def _with_what_engines_fuse(modules: Mapping[str, StoredModule]) -> set[str]:
    found = set(modules)
    for name in modules:
        parent = experts_parent(name)
        fused = fused_siblings(name, modules) if parent is None else None
        found |= {parent} if parent is not None else {fused[0]} if fused is not None else set()
    return found


def _prefixes(names: Iterable[str]) -> set[str]:
    """Every module that has a tensor, directly or further down."""
    found: set[str] = set()
    for name in names:
        module = name.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found
