"""Which norm can absorb a layer's input scale without changing the model.

A power-of-two scale on a norm's output can be undone in the columns of the layers that read it,
exactly. Whether those layers are all that read it is found by trying: scale the norm, divide the
layers' inputs by as much, and compare the model's output. No table of architectures is needed,
and a norm that does not simply multiply by its weight (Gemma's `1 + weight`), or that feeds a
router or a residual, fails the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoq.calibration import workers
from autoq.calibration.scales import sharing_sets
from autoq.formats import Container, QuantFormat
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot

EXACT_FOLD_TOLERANCE = 1e-5
"""Relative change of the output that a true fold may show: powers of two are exact, so all that is
left is the order of operations inside a norm's kernel."""


@dataclass(frozen=True, slots=True)
class ScalePlaces:
    """Where an input scale can be written: into a norm, or beside the weight."""

    folds: Mapping[SlotName, str]  # slot -> the norm that takes its scale
    fused: frozenset[SlotName]  # slots that engines fuse with others
    container: Container

    @classmethod
    def of(
        cls, model_map: ModelMap, folds: Mapping[SlotName, str], container: Container
    ) -> ScalePlaces:
        sets = [names for group in model_map.groups for names in group.fusion_sets]
        return cls(folds, frozenset(name for names in sets for name in names), container)

    def take(self, name: SlotName, fmt: QuantFormat) -> bool:
        """Whether there is a place for the slot's scale in the format."""
        if name in self.folds:
            return True
        is_stored = fmt.stores_input_scale and self.container is not Container.COMPRESSED_TENSORS
        return is_stored and (fmt.stores_fused_input_scale or name not in self.fused)


@dataclass(frozen=True, slots=True)
class _Candidate:
    norm: str
    slots: tuple[WeightSlot, ...]


def find_folds(
    model: nn.Module, model_map: ModelMap, run: Callable[[], Tensor]
) -> dict[SlotName, str]:
    """Slot -> path of the norm that can absorb its input scale exactly.

    Args:
        run: runs the model on some small input and returns its output; called a few times.
    Returns:
        Of several workers, the same on all: what all of them found.
    """
    candidates = _candidates(model, model_map, run)
    with torch.no_grad():
        expected = run()
        if not _survives(model, candidates, run, expected):
            candidates = [c for c in candidates if _survives(model, [c], run, expected)]
    found = {slot.name: c.norm for c in candidates for slot in c.slots}
    device = next(model.parameters()).device
    agreed = workers.all_hold([name in found for name in model_map.slots], device)
    return {name: found[name] for name, holds in zip(model_map.slots, agreed, strict=True) if holds}


def _candidates(
    model: nn.Module, model_map: ModelMap, run: Callable[[], Tensor]
) -> list[_Candidate]:
    """Norms whose output is the very tensor that the slots of one input scale receive."""
    norm_outputs: dict[int, tuple[str, Tensor]] = {}
    readers: dict[str, list[WeightSlot]] = {}

    def remember_norm(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        norm_outputs[id(output)] = (path, output)

    def remember_reader(call: MatrixCall, inputs: Tensor) -> Tensor:
        if id(inputs) in norm_outputs:
            readers.setdefault(norm_outputs[id(inputs)][0], []).append(call.slot)
        return call.compute(inputs)

    hooks = [
        module.register_forward_hook(partial(remember_norm, path))
        for path, module in model.named_modules()
        if _is_norm(module)
    ]
    try:
        with torch.no_grad(), tapped(model, model_map.slots.values(), remember_reader):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(_one_scale_each(readers, model_map))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _one_scale_each(
    readers: Mapping[str, Sequence[WeightSlot]], model_map: ModelMap
) -> Iterator[_Candidate]:
    """Only a norm read by all slots of one scale, and no others, can take that scale."""
    scaled_together = {frozenset(s) for group in model_map.groups for s in sharing_sets(group)}
    for norm, slots in readers.items():
        plain = all(slot.kind is not SlotKind.EXPERT for slot in slots)
        if plain and frozenset(slot.name for slot in slots) in scaled_together:
            yield _Candidate(norm, tuple(dict.fromkeys(slots)))


def _survives(
    model: nn.Module,
    candidates: Sequence[_Candidate],
    run: Callable[[], Tensor],
    expected: Tensor,
) -> bool:
    with _scaled(model, candidates):
        difference = (run() - expected).abs().max()
    return bool(difference <= EXACT_FOLD_TOLERANCE * expected.abs().max())


@contextmanager
def _scaled(model: nn.Module, candidates: Sequence[_Candidate]) -> Iterator[None]:
    """Norm outputs times varied powers of two, which their readers divide their inputs by.

    The readers' products stay exactly what they are; whatever else reads the norms changes.
    """
    scales: dict[SlotName, Tensor] = {}

    def divide_out(call: MatrixCall, inputs: Tensor) -> Tensor:
        return call.compute(inputs / scales[call.slot.name].to(inputs.dtype))

    with ExitStack() as stack:
        for candidate in candidates:
            scale = stack.enter_context(_scaled_norm(model, candidate))
            scales.update({slot.name: scale for slot in candidate.slots})
        readers = [slot for candidate in candidates for slot in candidate.slots]
        stack.enter_context(tapped(model, readers, divide_out))
        yield


@contextmanager
def _scaled_norm(model: nn.Module, candidate: _Candidate) -> Iterator[Tensor]:
    """The norm's weight and bias times a scale, which is returned: 1/2, 1 and 2 by turns."""
    norm: Any = model.get_submodule(candidate.norm)
    vectors = [norm.weight, *([norm.bias] if getattr(norm, "bias", None) is not None else [])]
    originals = [vector.detach().clone() for vector in vectors]
    exponents = torch.arange(norm.weight.shape[0], device=norm.weight.device) % 3 - 1
    scale = torch.exp2(exponents.float())
    try:
        for vector in vectors:
            vector.mul_(scale)
        yield scale
    finally:
        for vector, original in zip(vectors, originals, strict=True):
            vector.copy_(original)
