"""What is wrong with a checkpoint's layers beside each other: parts that engines fuse, and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoq.errors import ExportError
from autoq.export._aliases import experts_parent, fused_siblings
from autoq.export._read_back import same_bits
from autoq.export.checkup._files import StoredTensors
from autoq.export.checkup._manifest import Declared, Manifest
from autoq.export.checkup._modules import StoredModule
from autoq.formats import FORMATS, Container

_SHARED = ("weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale")


def fusion_faults(
    manifest: Manifest, modules: Mapping[str, StoredModule], tensors: StoredTensors
) -> Iterator[str]:
    """What is wrong between the parts of matrices that engines fuse, a line each."""
    seen: set[str] = set()
    for name in modules:
        fused = None if experts_parent(name) else fused_siblings(name, modules)
        if fused is None or fused[0] in seen:
            continue
        seen.add(fused[0])
        members = ", ".join(fused[1])
        try:
            labels = [manifest.declared(part) for part in fused[1]]
        except ExportError:
            continue  # said of the module already
        if len(set(labels)) > 1:
            yield f"engines fuse {members}, and the manifest gives them different formats"
            continue
        yield from _sharing_faults(fused[1], modules, tensors)
        yield from _unread_input_scales(fused[1], labels[0], modules, tensors)


def _unread_input_scales(
    parts: tuple[str, ...],
    declared: Declared | None,
    modules: Mapping[str, StoredModule],
    tensors: StoredTensors,
) -> Iterator[str]:
    """Scales of inputs that the engine of a format reads of layers only that it does not fuse."""
    if declared is None or declared.format is None:
        return
    fmt = FORMATS[declared.format]
    if not fmt.stores_input_scale or fmt.stores_fused_input_scale:
        return
    stored = [modules[part].tensors.get("pre_quant_scale") for part in parts]
    for scale in stored:
        if scale is not None and bool((tensors.read(scale.name) != 1).any()):
            yield (
                f"{scale.name} is not 1 everywhere, and engines fuse {', '.join(parts)} and pass "
                f"over it in {declared.label}: the norm before them must have it instead"
            )


def _sharing_faults(
    parts: tuple[str, ...], modules: Mapping[str, StoredModule], tensors: StoredTensors
) -> Iterator[str]:
    is_two_level = any(
        {"weight_scale_2", "weight_global_scale"} & modules[p].tensors.keys() for p in parts
    )
    for suffix in (*_SHARED, "pre_quant_scale"):
        stored = [modules[part].tensors.get(suffix) for part in parts]
        if not is_two_level or not any(stored):
            continue
        values = [tensors.read(tensor.name) for tensor in stored if tensor is not None]
        lacking = len(values) < len(stored)
        if lacking or any(not same_bits(value, values[0]) for value in values):
            yield (
                f"engines fuse {', '.join(parts)} and take one {suffix} of all: they must be equal, "
                "bit for bit, or weights come out wrong without an error"
            )


def exclusion_faults(manifest: Manifest, modules: Mapping[str, StoredModule]) -> Iterator[str]:
    """vLLM excludes what contains an entry; it and SGLang refuse fused parts that are torn apart."""
    if manifest.container is not Container.MODELOPT:
        return
    quantized = "\n".join(module.name for module in modules.values() if module.is_quantized)
    for entry in manifest.ignored:
        bare = entry.removesuffix("*").removesuffix(".") if entry.endswith("*") else entry
        if not bare or any(sign in bare for sign in "*?["):
            continue
        if bare in quantized:
            hit = next(name for name in quantized.splitlines() if bare in name)
            yield (
                f"the exclusion {entry!r} is part of the name of {hit}, which is quantised: vLLM "
                "leaves that out, too, and other engines do not"
            )
