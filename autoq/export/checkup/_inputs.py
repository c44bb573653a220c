"""Scales of inputs that are the reciprocals of what their container holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from autoq.errors import ExportError
from autoq.export.checkup._files import StoredTensors
from autoq.export.checkup._manifest import Manifest
from autoq.export.checkup._modules import StoredModule
from autoq.formats import FORMATS, WeightElement

_LARGEST_E4M3, _LARGEST_TWO_LEVEL = 448.0, 6.0 * 448.0
_DIVISOR, _FACTOR = "input_global_scale", "input_scale"

_LARGEST_MEDIAN = 2.0**13
"""Of the largest inputs of layers, the middle one: most linears have a norm before them, and single
inputs of thousands come in few layers. Scales that are turned over imply 448 * 448 / it in FP8, more
than this where the true one is below 24, and 2688 * 2688 / it in NVFP4, where it is below 882."""


def turned_input_scales(
    manifest: Manifest, modules: Mapping[str, StoredModule], tensors: StoredTensors
) -> Iterator[str]:
    """One line if the stored scales say of inputs what no model's are, as their reciprocals would."""
    implied: dict[str, float] = {}
    for module in modules.values():
        found = _implied_largest(manifest, module, tensors)
        if found is not None:
            implied |= found
    if not implied or median(implied.values()) <= _LARGEST_MEDIAN:
        return
    first, middle = next(iter(implied)), median(implied.values())
    yield (
        f"{first} and its like let inputs reach {middle:.3g} in half of the layers, as no model's do: "
        f"they are the reciprocals of what {manifest.container} checkpoints hold"
    )


def _implied_largest(
    manifest: Manifest, module: StoredModule, tensors: StoredTensors
) -> dict[str, float] | None:
    """Name of the scale -> the largest input that it lets be."""
    stored = module.tensors.get(_FACTOR) or module.tensors.get(_DIVISOR)
    try:
        declared = manifest.declared(module.name)
    except ExportError:
        return None  # said of the module already
    if stored is None or declared is None or declared.format is None:
        return None
    values = tensors.read(stored.name).float()
    scale = float(values.reshape(-1)[0]) if values.numel() == 1 else 0.0
    if not 0.0 < scale < float("inf"):
        return None  # said of the tensor already
    is_two_level = FORMATS[declared.format].weight_element is WeightElement.E2M1
    largest = _LARGEST_TWO_LEVEL if is_two_level else _LARGEST_E4M3
    is_divisor = module.tensors.get(_FACTOR) is None
    return {stored.name: largest / scale if is_divisor else largest * scale}
