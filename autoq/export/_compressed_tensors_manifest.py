"""The manifest of the compressed-tensors container: one group per format, targets as regexes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autoq.export._aliases import experts_aliases, experts_parent, fused_aliases
from autoq.export._kv_cache import manifest_entries as cache_entries
from autoq.export._layouts import manifest_entries
from autoq.formats import NONE, Container, FormatName

COMPRESSED = "compressed"
FORMAT_VERSION = "0.20.0"
MIXED_FORMAT = "mixed-precision"

COMPRESSED_TENSORS_SCHEMES = manifest_entries(Container.COMPRESSED_TENSORS)
"""Format -> a config group without its targets."""

# Stands for every expert's number in a name; no module name contains it.
_ANY_EXPERT = "\0"


_FP8 = FormatName("fp8")

# SGLang looks for experts by these names whatever a checkpoint calls them (Mixtral: w1, w3, w2).
_ENGINES_EXPERTS = ("gate_proj", "up_proj", "down_proj")

# vLLM's name for the decoder inside a model that sees or hears, whatever checkpoints call it.
_ENGINES_DECODER = "language_model.model.layers."


KEPT_EXPERTS = "re:^unquantised_experts$"
"""A target that matches no module, and tells transformers that experts are not packed.

transformers 5.23 unpacks the experts of any compressed-tensors checkpoint by the first group whose
targets speak of experts, else by the first one, and loses unquantised ones unless that group is FP8.
"""


def compressed_tensors_manifest(
    formats: Mapping[str, FormatName],
    exported_by: Mapping[str, Any],
    other_names: Mapping[str, str] | None = None,
    kv_cache: FormatName = NONE,
) -> dict[str, Any]:
    """config.json's quantization_config for the compressed-tensors container.

    Args:
        formats: checkpoint module name -> format, "none" included; at least one is not "none".
        exported_by: who wrote the checkpoint and from what; JSON values.
        other_names: checkpoint module name -> its path in transformers' model, where that differs.
            Readers match patterns with the names that modules have in their own models, so
            patterns match all of a module's names.
        kv_cache: format of the key/value cache in all layers.
    """
    heads = _heads(other_names or {})
    routed = {fmt for name, fmt in formats.items() if experts_parent(name)}
    used = [fmt for fmt in COMPRESSED_TENSORS_SCHEMES if fmt in formats.values()]
    # transformers unpacks experts by the first group that speaks of "experts", shared ones included.
    used.sort(key=lambda fmt: fmt not in routed)
    groups = {
        f"group_{number}": {
            "targets": module_patterns(formats, fmt, heads),
            **COMPRESSED_TENSORS_SCHEMES[fmt],
        }
        for number, fmt in enumerate(used)
    }
    if _loses_experts(formats, groups):
        groups = {"kept": {"targets": [KEPT_EXPERTS], **COMPRESSED_TENSORS_SCHEMES[_FP8]}, **groups}
    single = COMPRESSED_TENSORS_SCHEMES[used[0]]["format"] if len(groups) == 1 else MIXED_FORMAT
    return {
        "quant_method": "compressed-tensors",
        "format": single,
        "quantization_status": COMPRESSED,
        "version": FORMAT_VERSION,
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": module_patterns(formats, NONE, heads),
        **cache_entries(kv_cache, Container.COMPRESSED_TENSORS),
        "sparsity_config": {},
        "transform_config": {},
        "exported_by": dict(exported_by),
    }


def _loses_experts(formats: Mapping[str, FormatName], groups: Mapping[str, Any]) -> bool:
    """Whether transformers would unpack experts that nobody packed."""
    if not any(fmt == NONE and experts_parent(name) for name, fmt in formats.items()):
        return False
    speaking = [g for g in groups.values() if any("experts" in target for target in g["targets"])]
    weights = [*speaking, *groups.values()][0]["weights"]
    return bool((weights["type"], weights["num_bits"]) != ("float", 8))


def module_patterns(
    formats: Mapping[str, FormatName],
    wanted: FormatName,
    heads: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Anchored patterns that match the modules of one format, their fused aliases, nothing else.

    Modules outside the numbered layers are given by name. Fused aliases stand only in patterns
    that match real modules as well: TensorRT-LLM refuses a target that matches nothing.

    Args:
        heads: what stands before a layer's number in a checkpoint -> all that may stand there.
    """
    chosen = {name: fmt for name, fmt in formats.items() if fmt == wanted}
    experts = experts_aliases(formats)
    after = {last: fused for fused, (last, _) in fused_aliases(chosen).items()}
    names: dict[str, None] = {}
    for name in chosen:
        parent = experts_parent(name)
        if parent is not None and parent in experts:
            names.update({f"{parent}.{_ANY_EXPERT}.{leaf}": None for leaf in _ENGINES_EXPERTS})
        names[_for_any_expert(name, experts)] = None
        if name in after:
            names[after[name]] = None
    if wanted == NONE:
        names.update(dict.fromkeys(experts_aliases(chosen)))
    return _patterns(names, heads or {})


def _for_any_expert(name: str, uniform_experts: Mapping[str, FormatName]) -> str:
    parent = experts_parent(name)
    if parent is None or parent not in uniform_experts:
        return name
    _, _, rest = name.removeprefix(f"{parent}.").partition(".")
    return f"{parent}.{_ANY_EXPERT}.{rest}"


def _heads(other_names: Mapping[str, str]) -> dict[str, list[str]]:
    """What stands before a layer's number in a checkpoint -> all that readers have there."""
    found: dict[str, dict[str, None]] = {}
    for name, path in other_names.items():
        head, layer, *rest = _split(name)
        other_head, other_layer, *other_rest = _split(path)
        if (layer, rest) != (other_layer, other_rest):
            continue
        spellings = found.setdefault(head, {head: None})
        spellings[other_head] = None
        if layer is not None and "language_model" in other_head.split("."):
            spellings[_ENGINES_DECODER] = None
    return {head: list(spellings) for head, spellings in found.items()}


def _patterns(names: Iterable[str], heads: Mapping[str, Sequence[str]]) -> list[str]:
    """One pattern for all layers that have the same leaves in the same place."""
    leaves: dict[tuple[str, str | None, str], list[str]] = {}
    for name in names:
        head, layer, parent, leaf = _split(name)
        leaves.setdefault((head, layer, parent), []).append(leaf)
    layers: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    patterns: list[str] = []
    for (head, layer, parent), found in leaves.items():
        if layer is None:
            patterns += [f"{one}{leaf}" for leaf in found for one in heads.get(head, [head])]
        else:
            layers.setdefault((head, parent, tuple(found)), []).append(layer)
    for (head, parent, found_leaves), numbers in layers.items():
        path = rf"{_one_of(heads.get(head, [head]))}{_one_of(numbers)}\.{_escaped(parent)}{_leaf(found_leaves)}"
        patterns.append(f"re:^{path}$")
    return patterns


def _split(name: str) -> tuple[str, str | None, str, str]:
    """Name -> (path before the layer's number, the number, path between, leaf)."""
    *path, leaf = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdigit()), None)
    if number is None:
        return "".join(f"{part}." for part in path), None, "", leaf
    head, parent = path[:number], path[number + 1 :]
    return (
        "".join(f"{part}." for part in head),
        path[number],
        "".join(f"{part}." for part in parent),
        leaf,
    )


def _leaf(leaves: tuple[str, ...]) -> str:
    """`q_proj`, or `(q|k|v)_proj`, or `(query|key)`."""
    _, underscore, after = leaves[0].rpartition("_")
    shared = underscore + after
    stems = [leaf.removesuffix(shared) for leaf in leaves if leaf.endswith(shared)]
    if len(leaves) == 1 or not underscore or len(stems) < len(leaves) or not all(stems):
        return _one_of(leaves)
    return _one_of(stems) + _escaped(shared)


def _one_of(words: Iterable[str]) -> str:
    escaped = [_escaped(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _escaped(text: str) -> str:
    return re.escape(text).replace(re.escape(_ANY_EXPERT), r"\d+")
