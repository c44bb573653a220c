"""What a manifest says of a module, in autoq's names for formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent
from autoq.export._compressed_tensors_manifest import COMPRESSED, COMPRESSED_TENSORS_SCHEMES
from autoq.export._fp8_manifest import BLOCK_FORMAT, METHOD, left_out_modules
from autoq.export._modelopt_manifest import MIXED, MODELOPT_ENTRIES
from autoq.export._types import Spelling
from autoq.formats import FormatName
from autoq.layers.quantize import Container

FormatOf = Callable[[str], FormatName]
"""Name of a module that has quantised tensors -> its format; raises ExportError if unclear."""

_ALGORITHMS = {str(entry["quant_algo"]): fmt for fmt, entry in MODELOPT_ENTRIES.items()}

# A pattern is somebody else's program for our matcher: what can make it run for ages stays out.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_MAX_PATTERN_LENGTH = 100_000
_MAX_REPEATS = 8


def container_of(manifest: Mapping[str, Any]) -> Container:
    """Which container a quantization_config belongs to.

    Raises:
        ExportError: another method than those that autoq writes.
    """
    method = manifest.get("quant_method")
    if spelling_of(manifest) is Spelling.TRANSFORMERS_FP8:
        return Container.COMPRESSED_TENSORS
    for container in Container:
        if method == container.value:
            return container
    raise ExportError(
        f"a checkpoint must be modelopt, compressed-tensors or transformers' fp8 to be read, got "
        f"{method!r}; export it again with autoq"
    )


def spelling_of(manifest: Mapping[str, Any]) -> Spelling:
    """In which words a checkpoint with this quantization_config is written."""
    is_fp8 = manifest.get("quant_method") == METHOD
    return Spelling.TRANSFORMERS_FP8 if is_fp8 else Spelling.OWN


def fp8_formats(manifest: Mapping[str, Any]) -> FormatOf:
    """Formats by the manifest of transformers' own fp8."""
    left_out = set(left_out_modules(manifest))

    def listed(module: str) -> FormatName:
        if module in left_out:
            raise ExportError(f"{module} has scales, and the manifest leaves it out")
        return BLOCK_FORMAT

    return listed


def modelopt_formats(manifest: Mapping[str, Any]) -> FormatOf:
    """Formats by the flat manifest of the ModelOpt container."""
    algorithm = manifest.get("quant_algo")
    if algorithm != MIXED:
        uniform = _by_algorithm("this checkpoint", algorithm)
        return lambda module: uniform
    layers = _object(manifest, "quantized_layers")

    def mixed(module: str) -> FormatName:
        entry = layers.get(module) or layers.get(experts_parent(module) or module)
        if not isinstance(entry, Mapping):
            raise ExportError(f"{module} has scales, and quantized_layers does not list it")
        return _by_algorithm(module, entry.get("quant_algo"))

    return mixed


def compressed_tensors_formats(manifest: Mapping[str, Any]) -> FormatOf:
    """Formats by the groups of the compressed-tensors container."""
    if manifest.get("quantization_status") != COMPRESSED:
        raise ExportError("quantization_status must be 'compressed', or transformers reads garbage")
    groups = [
        (_format_of_group(name, group), pattern_matcher(_strings(group, "targets")))
        for name, group in _object(manifest, "config_groups").items()
    ]
    is_ignored = pattern_matcher(_strings(manifest, "ignore"))

    def matched(module: str) -> FormatName:
        found = [fmt for fmt, matches in groups if matches(module)]
        if len(found) != 1 or is_ignored(module):
            raise ExportError(
                f"{module} has scales, so exactly one config group must name it and ignore must "
                f"not; {len(found)} groups do{', ignore does' if is_ignored(module) else ''}"
            )
        return found[0]

    return matched


def pattern_matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module name is one of `patterns`, which hold names and "re:" regexes.

    Raises:
        ExportError: a regex is invalid or could take for ever.
    """
    names: set[str] = set()
    regexes: list[re.Pattern[str]] = []
    for pattern in patterns:
        if pattern.startswith("re:"):
            regexes.append(_compiled(pattern.removeprefix("re:")))
        else:
            names.add(pattern)
    return lambda module: module in names or any(regex.match(module) for regex in regexes)


def _compiled(pattern: str) -> re.Pattern[str]:
    repeats = sum(pattern.count(sign) for sign in "*+{")
    too_costly = _REPEATED_GROUP.search(pattern) or repeats > _MAX_REPEATS
    if too_costly or len(pattern) > _MAX_PATTERN_LENGTH:
        raise ExportError(f"the pattern {pattern[:80]!r} in the manifest is too costly to match")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ExportError(f"the pattern {pattern[:80]!r} in the manifest: {error}") from error


def _format_of_group(name: str, group: Any) -> FormatName:
    if not isinstance(group, Mapping):
        raise ExportError(f"config group {name} must be an object")
    for fmt, scheme in COMPRESSED_TENSORS_SCHEMES.items():
        if all(group.get(key) == value for key, value in scheme.items()):
            return fmt
    known = ", ".join(COMPRESSED_TENSORS_SCHEMES)
    raise ExportError(f"config group {name} ({group.get('format')}) is none of {known}")


def _by_algorithm(module: str, algorithm: Any) -> FormatName:
    if algorithm not in _ALGORITHMS:
        known = ", ".join(_ALGORITHMS)
        raise ExportError(f"{module} is quantised with {algorithm!r}; autoq reads {known}")
    return _ALGORITHMS[algorithm]


def _object(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if not isinstance(value, Mapping):
        raise ExportError(f"the manifest must have an object {key}, got {type(value).__name__}")
    return value


def _strings(parent: Mapping[str, Any], key: str) -> list[str]:
    value = parent.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ExportError(f"the manifest must have a list of names {key}")
    return value
