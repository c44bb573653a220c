"""Running a model with an assignment: quantised weights and inputs in the place of its own.

Weights are swapped for their dequantised values and inputs are quantised and dequantised, so the
model computes, in its own dtype, with exactly the numbers that the exported checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers._inputs import SimulatedProducts
from autoq.layers._types import Container, LayerCalibration
from autoq.layers.kv_cache import CacheSimulation
from autoq.layers.quantize import fake_quantize_weight
from autoq.layers.taps import install_taps
from autoq.layers.weight_cache import WeightCache
from autoq.models import Assignment, ModelMap, SlotName, WeightSlot
from autoq.models.weights import slot_weight


class SimulatedModel:
    """A model whose slots compute in the formats of an assignment, until `restore` is called."""

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[SlotName, WeightSlot],
        slot_formats: Mapping[SlotName, FormatName],
        calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration],
        *,
        container: Container,
        scale_dtype: torch.dtype,
        weights: Mapping[SlotName, Tensor] | None = None,
        keep_originals: bool = True,
        cache: WeightCache | None = None,
    ) -> None:
        """
        Args:
            model: changed in place.
            slot_formats: format of every slot; "none" leaves a slot as it is.
            weights: dequantised weights [out, in] to use instead of quantising the model's own,
                for example those read from a checkpoint.
            keep_originals: without them less memory is used, and the assignment is final.
            cache: quantised weights are taken from there, and left there, where there is one; for
                this model, calibration and container alone.
        """
        self.model = model
        self._slots = slots
        self._calibration = calibration
        self._container = container
        self._scale_dtype = scale_dtype
        self._cache = WeightCache(0) if cache is None else cache
        self._formats: dict[SlotName, FormatName] = {}
        self._owners = _owners(model, slots)
        self._originals: dict[SlotName, Tensor] | None = {} if keep_originals else None
        self._remove_taps: Callable[[], None] = _nothing
        self._kv_cache: CacheSimulation | None = None
        self.apply(slot_formats, weights=weights)

    def apply(
        self,
        slot_formats: Mapping[SlotName, FormatName],
        *,
        weights: Mapping[SlotName, Tensor] | None = None,
    ) -> None:
        """Change to another assignment; only slots whose format changes are touched.

        Of slots that share one matrix the first decides what it holds.
        """
        changes = {
            name: slot_formats.get(name, NONE)
            for name in self._slots
            if slot_formats.get(name, NONE) != self._formats.get(name, NONE)
        }
        if changes.keys() & self._formats.keys():
            self._kept_originals()
        self._remove_taps()
        for name, wanted in changes.items():
            if self._owners[name] == name:
                self._change(name, wanted, None if weights is None else weights.get(name))
            self._formats[name] = wanted
        self._formats = {name: fmt for name, fmt in self._formats.items() if fmt != NONE}
        self._install_taps()

    def set_kv_cache(self, kv_cache: CacheSimulation | None) -> None:
        """Quantise what is cached as well, from now until `restore`; None: leave it alone."""
        if self._kv_cache is not None:
            self._kv_cache.remove()
        self._kv_cache = kv_cache
        if kv_cache is not None:
            kv_cache.install()

    def _change(self, name: SlotName, wanted: FormatName, replacement: Tensor | None) -> None:
        weight = slot_weight(self.model, self._slots[name])
        if name in self._formats:
            weight.copy_(self._kept_originals().pop(name))
        if wanted == NONE:
            return
        if replacement is None:
            replacement = self._quantized(name, wanted, weight)
        if self._originals is not None:
            self._originals[name] = weight.clone()
        weight.copy_(replacement)

    def _quantized(self, name: SlotName, wanted: FormatName, weight: Tensor) -> Tensor:
        kept = self._cache.get(name, wanted)
        if kept is not None:
            return kept
        found = fake_quantize_weight(
            weight.float(),
            FORMATS[wanted],
            self._calibration[name, wanted],
            scale_dtype=self._scale_dtype,
            container=self._container,
        ).to(weight.dtype)
        self._cache.put(name, wanted, found)
        return found

    def _install_taps(self) -> None:
        products = SimulatedProducts(self._slots, self._formats, self._calibration, self._container)
        self._remove_taps = install_taps(
            self.model, [self._slots[name] for name in self._formats], products
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The original model, for as long as the context lasts."""
        originals, kv_cache = self._kept_originals(), self._kv_cache
        self._remove_taps()
        self.set_kv_cache(None)
        self._exchange(originals)
        try:
            yield
        finally:
            self._exchange(originals)
            self._install_taps()
            self.set_kv_cache(kv_cache)

    def leave(self) -> None:
        """Quantise no input any more, and let the weights be: for those that come and go."""
        self._remove_taps()
        self._remove_taps = _nothing

    def restore(self) -> None:
        """Give the model its own weights back, and its own cache."""
        self.set_kv_cache(None)
        self.apply({})

    def _exchange(self, weights: Mapping[SlotName, Tensor]) -> None:
        for name, other in weights.items():
            weight = slot_weight(self.model, self._slots[name])
            current = weight.clone()
            weight.copy_(other)
            other.copy_(current)

    def _kept_originals(self) -> dict[SlotName, Tensor]:
        if self._originals is None:
            raise RuntimeError("the original weights were not kept")
        return self._originals


def _owners(model: nn.Module, slots: Mapping[SlotName, WeightSlot]) -> dict[SlotName, SlotName]:
    """Slot -> the first slot with the same matrix; most own theirs."""
    first: dict[int, SlotName] = {}
    return {
        name: first.setdefault(slot_weight(model, slot).data_ptr(), name)
        for name, slot in slots.items()
    }


def _nothing() -> None:
    """Before any tap is installed there is none to remove."""


def slot_formats_of(model_map: ModelMap, assignment: Assignment) -> dict[SlotName, FormatName]:
    """Format of every slot under an assignment of groups."""
    return {slot: assignment[group.name] for group in model_map.groups for slot in group.slots}
