"""Which norm can absorb a layer's input scale without changing the model.

A power-of-two scale on a norm's output can be undone in the columns of the layers that read it,
exactly. Whether those layers are all that read it is found by trying: scale, undo, and compare
the model's output. No table of architectures is needed, and a norm that does not simply multiply
by its weight (Gemma's `1 + weight`), or that feeds a router or a residual, fails the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoq.layers.taps import MatrixCall, tapped
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot
from autoq.models.weights import slot_weight

EXACT_FOLD_TOLERANCE = 1e-5
"""Relative change of the output that a true fold may show: powers of two are exact, so all that is
left is the order of additions inside a norm's or a matrix product's kernel."""


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
    """
    candidates = _candidates(model, model_map, run)
    with torch.no_grad():
        expected = run()
        if not _survives(model, candidates, run, expected):
            candidates = [c for c in candidates if _survives(model, [c], run, expected)]
    return {slot.name: c.norm for c in candidates for slot in c.slots}


def _candidates(
    model: nn.Module, model_map: ModelMap, run: Callable[[], Tensor]
) -> list[_Candidate]:
    """Norms whose output is the very tensor that slots of one decision group receive."""
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
    return list(_one_group_each(readers, model_map))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _one_group_each(
    readers: Mapping[str, Sequence[WeightSlot]], model_map: ModelMap
) -> Iterator[_Candidate]:
    """Only a norm read by one whole decision group can be folded whatever the others take."""
    group_of = model_map.group_of()
    for norm, slots in readers.items():
        groups = {group_of[slot.name] for slot in slots}
        plain = all(slot.kind is not SlotKind.EXPERT for slot in slots)
        if len(groups) == 1 and plain:
            yield _Candidate(norm, tuple(dict.fromkeys(slots)))


def _survives(
    model: nn.Module,
    candidates: Iterable[_Candidate],
    run: Callable[[], Tensor],
    expected: Tensor,
) -> bool:
    with _scaled(model, list(candidates)):
        difference = (run() - expected).abs().max()
    return bool(difference <= EXACT_FOLD_TOLERANCE * expected.abs().max())


@contextmanager
def _scaled(model: nn.Module, candidates: Sequence[_Candidate]) -> Iterator[None]:
    """Norm outputs times varied powers of two, the readers' columns divided by them."""
    undo = [_scale_one(model, candidate) for candidate in candidates]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _scale_one(model: nn.Module, candidate: _Candidate) -> Callable[[], None]:
    norm: Any = model.get_submodule(candidate.norm)
    weights = [slot_weight(model, slot) for slot in candidate.slots]
    scale = _varied_powers_of_two(weights[0])
    scaled = [norm.weight, *([norm.bias] if getattr(norm, "bias", None) is not None else [])]
    originals = [tensor.detach().clone() for tensor in (*scaled, *weights)]
    for vector in scaled:
        vector.mul_(scale)
    for weight in weights:
        weight.div_(scale)

    def restore() -> None:
        for tensor, original in zip((*scaled, *weights), originals, strict=True):
            tensor.copy_(original)

    return restore


def _varied_powers_of_two(weight: Tensor) -> Tensor:
    """1/2, 1 and 2 by turns, [in_features]."""
    exponents = torch.arange(weight.shape[1], device=weight.device) % 3 - 1
    return torch.exp2(exponents.to(torch.float32)).to(weight.dtype)
