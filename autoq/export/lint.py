"""Reading a manifest as each engine does, and finding what an engine would take differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoq.errors import ExportError
from autoq.export._aliases import experts_aliases, experts_parent, fused_aliases, part_aliases
from autoq.export._compressed_tensors_manifest import KEPT_EXPERTS
from autoq.export._kv_cache import cache_faults
from autoq.export._manifest_reading import compressed_tensors_formats, pattern_matcher
from autoq.export._modelopt_manifest import MIXED, MODELOPT_ENTRIES
from autoq.formats import NONE, Container, FormatName

_Formats = Mapping[str, FormatName]


def modelopt_faults(
    flat: Mapping[str, Any],
    nested: Mapping[str, Any],
    formats: _Formats,
    kv_cache: FormatName = NONE,
) -> Iterator[str]:
    """What is wrong with the two manifests of a ModelOpt checkpoint, a line each.

    Args:
        flat: config.json's quantization_config.
        nested: hf_quant_config.json.
        formats: format of every linear module of the checkpoint, "none" included.
        kv_cache: format of the key/value cache, whose scales are there unless it is "none".
    """
    inner = nested.get("quantization")
    if not isinstance(inner, Mapping):
        yield "hf_quant_config.json must have an object quantization"
        return
    pairs = (("quant_algo", "quant_algo"), ("ignore", "exclude_modules"))
    for ours, theirs in (*pairs, ("quantized_layers", "quantized_layers")):
        if flat.get(ours) != inner.get(theirs):
            yield f"config.json's {ours} and hf_quant_config.json's {theirs} must be equal"
    yield from cache_faults(flat, Container.MODELOPT, kv_cache)
    if flat.get("kv_cache_quant_algo") != inner.get("kv_cache_quant_algo"):
        yield "kv_cache_quant_algo of config.json and of hf_quant_config.json must be equal"
    ignore = flat.get("ignore") or []
    yield from _ignore_faults(ignore, formats)
    if flat.get("quant_algo") == MIXED:
        yield from _map_faults(flat.get("quantized_layers") or {}, formats)
    else:
        yield from _uniform_faults(flat, formats)


def _ignore_faults(ignore: list[str], formats: _Formats) -> Iterator[str]:
    listed = set(ignore)
    quantized = "\n".join(name for name, fmt in formats.items() if fmt != NONE)
    for name, fmt in formats.items():
        if fmt == NONE and not {name, experts_parent(name)} & listed:
            yield f"{name} is not quantised and must be ignored"
    for entry in ignore:
        if entry in quantized:
            yield f"the ignored {entry} is part of a quantised module's name"


def _map_faults(layers: Mapping[str, Any], formats: _Formats) -> Iterator[str]:
    quantized = {name: fmt for name, fmt in formats.items() if fmt != NONE}
    fused = {name: fmt for name, (_, fmt) in fused_aliases(quantized).items()}
    expected = {**quantized, **fused, **part_aliases(quantized), **experts_aliases(quantized)}
    for name, fmt in expected.items():
        if layers.get(name) != MODELOPT_ENTRIES[fmt]:
            yield f"quantized_layers must say {fmt} of {name}, got {layers.get(name)}"
    for name in layers:
        if name not in expected:
            yield f"quantized_layers names {name}, which is not quantised"


def _uniform_faults(flat: Mapping[str, Any], formats: _Formats) -> Iterator[str]:
    for name, fmt in formats.items():
        if fmt != NONE and MODELOPT_ENTRIES[fmt]["quant_algo"] != flat.get("quant_algo"):
            yield f"{name} is {fmt}, and the manifest says {flat.get('quant_algo')} of everything"


def compressed_tensors_faults(
    manifest: Mapping[str, Any], formats: _Formats, kv_cache: FormatName = NONE
) -> Iterator[str]:
    """What is wrong with a compressed-tensors manifest, a line each.

    Args:
        manifest: config.json's quantization_config.
        formats: format of every linear module of the checkpoint, "none" included.
        kv_cache: format of the key/value cache, whose scales are there unless it is "none".
    """
    try:
        format_of = compressed_tensors_formats(manifest)
        is_ignored = pattern_matcher(manifest["ignore"])
        for group in manifest["config_groups"].values():
            yield from _dead_targets(group["targets"], formats)
    except ExportError as error:
        yield str(error)
        return
    yield from cache_faults(manifest, Container.COMPRESSED_TENSORS, kv_cache)
    fused = {name: fmt for name, (_, fmt) in fused_aliases(formats).items()}
    for name, fmt in {**formats, **fused}.items():
        try:
            found = format_of(name)
        except ExportError:
            found = NONE
        if found != fmt or is_ignored(name) != (fmt == NONE):
            yield f"the manifest must say {fmt} of {name}, and says {found}"


def _dead_targets(targets: list[str], formats: _Formats) -> Iterator[str]:
    """TensorRT-LLM refuses a target that matches no module."""
    for target in targets:
        matches = pattern_matcher([target])
        if target != KEPT_EXPERTS and not any(matches(name) for name in formats):
            yield f"the target {target} matches no module"
