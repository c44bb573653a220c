"""Names that engines give to fused modules, which a manifest has to hold beside the real ones."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from autoq.formats import FormatName

# Leaf names that engines fuse into one matrix, and what they call the result.
_FUSED_LEAVES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("query", "key", "value"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
)
_EXPERT = re.compile(r"(?P<parent>.+\.experts)\.\d+\..+")


def experts_parent(module: str) -> str | None:
    """The path of the experts that `module` is one of, or None."""
    match = _EXPERT.fullmatch(module)
    return match["parent"] if match else None


def fused_aliases(formats: Mapping[str, FormatName]) -> dict[str, tuple[str, FormatName]]:
    """Fused name -> (last of its parts in the order of `formats`, the format of all of them).

    Args:
        formats: module name -> format. Parts of different formats get no alias.
    """
    aliases: dict[str, tuple[str, FormatName]] = {}
    for parent, leaves in _leaves_by_parent(formats).items():
        for parts, fused_leaf in _FUSED_LEAVES:
            fused = f"{parent}{fused_leaf}"
            shared = {formats[f"{parent}{leaf}"] for leaf in parts if leaf in leaves}
            if set(parts) <= leaves.keys() and len(shared) == 1 and fused not in formats:
                last = max(parts, key=leaves.__getitem__)
                aliases[fused] = (f"{parent}{last}", shared.pop())
    return aliases


def part_aliases(formats: Mapping[str, FormatName]) -> dict[str, FormatName]:
    """Names of the parts of modules that a checkpoint holds fused, as Phi-3's -> their format.

    TensorRT-LLM looks for the first part's entry whatever the checkpoint holds.
    """
    aliases: dict[str, FormatName] = {}
    for module, fmt in formats.items():
        parent, dot, leaf = module.rpartition(".")
        parts = next((parts for parts, fused in _FUSED_LEAVES if fused == leaf), ())
        names = [f"{parent}{dot}{part}" for part in parts]
        if not any(name in formats for name in names):
            aliases.update(dict.fromkeys(names, fmt))
    return aliases


def experts_aliases(formats: Mapping[str, FormatName]) -> dict[str, FormatName]:
    """Path of a layer's experts -> the format of all of them; mixed experts get no alias."""
    found: dict[str, set[FormatName]] = {}
    for module, fmt in formats.items():
        parent = experts_parent(module)
        if parent is not None:
            found.setdefault(parent, set()).add(fmt)
    return {parent: shared.pop() for parent, shared in found.items() if len(shared) == 1}


def _leaves_by_parent(modules: Iterable[str]) -> dict[str, dict[str, int]]:
    parents: dict[str, dict[str, int]] = {}
    for position, module in enumerate(modules):
        head, dot, leaf = module.rpartition(".")
        if experts_parent(module) is None:
            parents.setdefault(head + dot, {})[leaf] = position
    return parents


def fused_siblings(module: str, modules: Container[str]) -> tuple[str, tuple[str, ...]] | None:
    """(Name that engines give to the matrix they fuse a module into, all its parts), or None.

    Args:
        modules: those that there are; a matrix is fused of two parts or more.
    """
    head, dot, leaf = module.rpartition(".")
    for leaves, fused in _FUSED_LEAVES:
        parts = tuple(f"{head}{dot}{part}" for part in leaves if f"{head}{dot}{part}" in modules)
        if leaf in leaves and len(parts) > 1:
            return f"{head}{dot}{fused}", parts
    return None
