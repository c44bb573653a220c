"""The key/value cache in checkpoints: what manifests say of it, its scales, and reading both back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.formats import NONE, Container, FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import CacheCoding, attention_modules

SCALE_NAMES = {
    Container.MODELOPT: ("k_proj.k_scale", "v_proj.v_scale"),
    Container.COMPRESSED_TENSORS: ("k_scale", "v_scale"),
}
"""What follows an attention's name; of modelopt whether or not it has a projection of that name."""

_SHAPES: Mapping[Container, tuple[int, ...]] = {
    Container.MODELOPT: (),
    Container.COMPRESSED_TENSORS: (1,),
}
_ELEMENTS = {"fp8": ("float", 8), "int8": ("int", 8)}
_MODELOPT_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_SCALE = re.compile(r"\.(?:k_proj\.k_scale|v_proj\.v_scale|[kv]_scale)$")


@dataclass(frozen=True, slots=True)
class ExportedCache:
    """A plan's cache: calibrated layers, and the format of each."""

    layers: tuple[CachedLayer, ...]
    formats: Mapping[str, FormatName]

    @property
    def format(self) -> FormatName:
        """That of all layers; "none" where they differ, which no container states."""
        found = set(self.formats.values())
        return found.pop() if len(found) == 1 else NONE


def cache_refusal(formats: Iterable[FormatName], container: Container) -> str | None:
    """Why a container cannot hold a cache; None if it can.

    Args:
        formats: of the layers; none where the cache was not decided on.
    """
    found = sorted(set(formats))
    if len(found) > 1:
        return (
            f"{container} checkpoints state one format of the key/value cache for all layers, and this "
            f"plan has {', '.join(found)}; search with --kv-scope model"
        )
    return kv_cache_refusal(found[0], container) if found else None


def manifest_entries(fmt: FormatName, container: Container) -> dict[str, Any]:
    """What config.json's quantization_config says of the cache."""
    if fmt == NONE:
        nothing = {"kv_cache_scheme": None}
        return (
            {**nothing, "kv_cache_quant_algo": None} if container is Container.MODELOPT else nothing
        )
    if container is Container.MODELOPT:
        name = KV_CACHE_FORMATS[fmt].modelopt_name
        return {
            "kv_cache_scheme": dict(_MODELOPT_FP8) if fmt == "fp8" else name,
            "kv_cache_quant_algo": name,
        }
    element, bits = _ELEMENTS[fmt]
    return {
        "kv_cache_scheme": {
            "num_bits": bits,
            "type": element,
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        }
    }


def cache_tensors(
    cache: ExportedCache, modules: Mapping[str, str], container: Container
) -> dict[str, Tensor]:
    """Name in the checkpoint -> scale, float32 [] in modelopt and [1] in compressed-tensors.

    Args:
        modules: path of a linear in the model -> its name in the checkpoint.
    Raises:
        ExportError: an attention's name in the checkpoint is not known.
    """
    found: dict[str, Tensor] = {}
    for layer in cache.layers:
        coding = CacheCoding.of(layer, cache.formats[layer.name])
        parent = _stored_name(layer.name, modules)
        for name, scale in zip(
            SCALE_NAMES[container], (coding.key_scale, coding.value_scale), strict=True
        ):
            found[f"{parent}.{name}"] = scale.reshape(_SHAPES[container])
    return found


def _stored_name(attention: str, modules: Mapping[str, str]) -> str:
    """Name of an attention in the checkpoint, from that of a linear in it."""
    for path, name in modules.items():
        leaf = path.removeprefix(attention)
        if path.startswith(f"{attention}.") and name.endswith(leaf):
            return name.removesuffix(leaf)
    raise ExportError(
        f"what the checkpoint calls {attention} is not known, so the scales of its key/value cache "
        "have no name; search without --kv-formats"
    )


@dataclass(frozen=True, slots=True)
class StoredCache:
    """What a checkpoint says of its cache."""

    format: FormatName
    scales: Mapping[str, tuple[str, str]]
    """Attention in the checkpoint -> names of both scales; without any all are 1, which engines take
    for FP8 in modelopt checkpoints, and ModelOpt leaves away where it did not calibrate them."""


def stored_cache(
    manifest: Mapping[str, Any], container: Container | None, names: Iterable[str]
) -> StoredCache | None:
    """The cache of a checkpoint; None where no manifest promises a quantised one.

    Args:
        names: of all tensors.
    Raises:
        ExportError: the manifest names a format that autoq does not have, or scales are missing.
    """
    fmt = _stated_format(manifest, container)
    if fmt == NONE or container is None:
        return None
    known = set(names)
    found: dict[str, tuple[str, str]] = {}
    for name in known:
        match = _SCALE.search(name)
        if match is None:
            continue
        parent = name[: match.start()]
        for keys, values in SCALE_NAMES.values():  # engines take either spelling
            if f"{parent}.{keys}" in known and f"{parent}.{values}" in known:
                found[parent] = f"{parent}.{keys}", f"{parent}.{values}"
        if parent not in found:
            raise ExportError(
                f"{name} is the scale of one half of a key/value cache; one is missing"
            )
    if not found and (container is not Container.MODELOPT or fmt != "fp8"):
        raise ExportError(
            "the manifest promises a quantised key/value cache, and there are no scales of one; export "
            "it again"
        )
    return StoredCache(fmt, dict(sorted(found.items())))


def _stated_format(manifest: Mapping[str, Any], container: Container | None) -> FormatName:
    scheme, name = manifest.get("kv_cache_scheme"), manifest.get("kv_cache_quant_algo")
    if container is None or (scheme is None and name is None):
        return NONE
    for entry in KV_CACHE_FORMATS.values():
        if entry.name == NONE or kv_cache_refusal(entry.name, container) is not None:
            continue
        wanted = manifest_entries(entry.name, container)["kv_cache_scheme"]
        if container is Container.MODELOPT:
            # ModelOpt itself writes the name into hf_quant_config.json alone.
            if name == entry.modelopt_name or (name is None and scheme == wanted):
                return entry.name
            continue
        given = {"symmetric": True, "dynamic": False, **scheme} if isinstance(scheme, dict) else {}
        if all(given.get(key) == value for key, value in wanted.items()):
            return entry.name
    raise ExportError(
        f"the manifest states a key/value cache that autoq does not read: {name or scheme}"
    )


def stored_codings(
    model: nn.Module, stored: StoredCache, scale: Mapping[str, Tensor]
) -> dict[str, CacheCoding]:
    """Attention in the model -> how it caches.

    Args:
        model: of the checkpoint's architecture.
        scale: tensors by name, at least those that `stored` names.
    Raises:
        ExportError: a scale belongs to no attention of the model, or is no positive number.
    """
    paths = attention_modules(model)
    one = torch.ones(())
    found = {} if stored.scales else {path: CacheCoding(stored.format, one, one) for path in paths}
    for parent, names in stored.scales.items():
        path = _path_of(parent, paths)
        if path is None:
            raise ExportError(
                f"{names[0]} is the scale of a key/value cache, and {type(model).__name__} has no "
                f"attention {parent}"
            )
        keys, values = (_checked(name, scale[name]) for name in names)
        found[path] = CacheCoding(stored.format, keys, values)
    return found


def _path_of(name: str, paths: Iterable[str]) -> str | None:
    """The attention of the model that a checkpoint calls by a name: what follows is the same."""
    tail = re.search(r"(?:layers|h|blocks)\.\d+\..*$", name)
    for path in paths:
        if path == name or (tail is not None and path.endswith(f".{tail[0]}")):
            return path
    return None


def _checked(name: str, scale: Tensor) -> Tensor:
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ExportError(f"{name} must be one number, and is {scale.dtype} {tuple(scale.shape)}")
    value = scale.float().reshape(())
    if not 0.0 < float(value) < float("inf"):
        raise ExportError(f"{name} must be positive and finite, got {float(value):g}")
    return value


def cache_faults(
    manifest: Mapping[str, Any], container: Container, fmt: FormatName
) -> Iterable[str]:
    """How a manifest's words on the cache differ from what it is, a line each."""
    if fmt == NONE and any(manifest.get(key) for key in manifest_entries(fmt, container)):
        yield "a manifest must not promise a quantised key/value cache without its scales"
        return
    for key, wanted in manifest_entries(fmt, container).items():
        if manifest.get(key) != wanted:
            yield f"{key} must be {wanted} for a key/value cache in {fmt}, got {manifest.get(key)}"
