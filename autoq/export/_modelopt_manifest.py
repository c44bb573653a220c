"""The two manifests of the ModelOpt unified container, generated from one map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoq.export._aliases import experts_aliases, experts_parent, fused_aliases, part_aliases
from autoq.export._kv_cache import manifest_entries as cache_entries
from autoq.export._layouts import manifest_entries
from autoq.formats import NONE, Container, FormatName

MODELOPT_ENTRIES = manifest_entries(Container.MODELOPT)
"""Format -> what a manifest says of it: per layer when formats are mixed, else once for all."""

MIXED = "MIXED_PRECISION"

# Readers recognise the dialect by this name and version; who really wrote it is `exported_by`.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


@dataclass(frozen=True, slots=True)
class ModelOptManifest:
    """The same facts in both spellings that readers want."""

    flat: Mapping[str, Any]  # config.json's quantization_config
    nested: Mapping[str, Any]  # hf_quant_config.json


def modelopt_manifest(
    formats: Mapping[str, FormatName],
    exported_by: Mapping[str, Any],
    kv_cache: FormatName = NONE,
) -> ModelOptManifest:
    """What the ModelOpt container's readers need to know.

    One format alone gives the uniform manifest (SGLang takes a mixed one without NVFP4 for
    something else), several give MIXED_PRECISION with an entry for every module and fused alias.

    Args:
        formats: checkpoint module name -> format, "none" included; at least one is not "none".
        exported_by: who wrote the checkpoint and from what; JSON values.
        kv_cache: format of the key/value cache in all layers.
    """
    used = sorted({fmt for fmt in formats.values() if fmt != NONE})
    ignore = _ignored(formats)
    if len(used) == 1:
        flat, nested = _uniform(used[0], ignore)
    else:
        flat, nested = _mixed(formats, used, ignore)
    cache = cache_entries(kv_cache, Container.MODELOPT)
    flat.update(cache)
    nested["kv_cache_quant_algo"] = cache["kv_cache_quant_algo"]
    stamp = {"producer": dict(_PRODUCER), "exported_by": dict(exported_by)}
    return ModelOptManifest(
        flat={"quant_method": "modelopt", **flat, **stamp},
        nested={**stamp, "quantization": nested},
    )


def _uniform(fmt: FormatName, ignore: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    entry = MODELOPT_ENTRIES[fmt]
    flat = {**entry, "kv_cache_scheme": None, "kv_cache_quant_algo": None, "ignore": ignore}
    nested = {**entry, "kv_cache_quant_algo": None, "exclude_modules": ignore}
    return flat, nested


def _mixed(
    formats: Mapping[str, FormatName], used: Iterable[FormatName], ignore: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    layers = {name: dict(MODELOPT_ENTRIES[fmt]) for name, fmt in _mapped(formats).items()}
    flat = {
        "quant_algo": MIXED,
        "kv_cache_scheme": None,
        "kv_cache_quant_algo": None,
        "ignore": ignore,
        "quantized_layers": layers,
    }
    group_sizes = [MODELOPT_ENTRIES[fmt].get("group_size") for fmt in used]
    nested = {
        "quant_algo": MIXED,
        "kv_cache_quant_algo": None,
        "group_size": min((size for size in group_sizes if size), default=None),
        "exclude_modules": ignore,
        "quantized_layers": layers,
    }
    return flat, nested


def _mapped(formats: Mapping[str, FormatName]) -> dict[str, FormatName]:
    quantized = {name: fmt for name, fmt in formats.items() if fmt != NONE}
    after = {last: fused for fused, (last, _) in fused_aliases(quantized).items()}
    mapped: dict[str, FormatName] = {}
    for name, fmt in quantized.items():
        mapped[name] = fmt
        if name in after:
            mapped[after[name]] = fmt
    return {**mapped, **part_aliases(quantized), **experts_aliases(quantized)}


def _ignored(formats: Mapping[str, FormatName]) -> list[str]:
    """Full leaf names; experts once, by their parent, which is what engines ask about."""
    left_out = {name: fmt for name, fmt in formats.items() if fmt == NONE}
    return list(dict.fromkeys(experts_parent(name) or name for name in left_out))
