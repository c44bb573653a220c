"""From a target, or none, to the formats and the container that a search takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from autoq.api.config import parse_container
from autoq.api.exports.exporting import inexpressible
from autoq.errors import InputError
from autoq.export import first_container
from autoq.formats import (
    FORMATS,
    NONE,
    Container,
    FormatName,
    Target,
    Verdict,
    containers_for,
    feasible_formats,
    offered_formats,
    portable_formats,
    reasons,
    support,
)
from autoq.models import GroupName, ModelMap, SlotKind
from autoq.progress import Progress

Unusable: TypeAlias = dict[tuple[GroupName, FormatName], str]
"""Group and format -> why the container or the target cannot take it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A container and the formats to choose from in it."""

    container: Container
    formats: tuple[FormatName, ...]
    named: bool = True  # by the user; what is offered unasked may be left out again


def offers(
    target: Target | None, formats: Sequence[str] | None, container: str | None
) -> tuple[Offer, ...]:
    """What may be searched for, the best first; several only where the container is left open.

    Args:
        target: where the checkpoint is to run; None knows of no place, and offers formats that
            every engine loads, unless others are named.
        formats: names; None is what the target runs of those that need not be named.
        container: name; None is the target's best, or the first that can express the formats.
    Raises:
        InputError: the target runs none of the formats, one that was named, or reads the
            container not at all; the message has the reason.
    """
    named = None if formats is None else tuple(FormatName(name) for name in formats)
    if target is None:
        unasked = portable_formats() if named is None else named
        if container is not None:
            return (Offer(parse_container(container), unasked),)
        return (Offer(first_container(unasked) or Container.MODELOPT, unasked),)
    readable = containers_for(target)
    if not readable:
        raise InputError(_nothing_runs(target))
    if container is not None:
        chosen = parse_container(container)
        if chosen not in readable:
            raise InputError(_unreadable(target, chosen, readable))
        readable = (chosen,)
    if named is None:
        found = [Offer(entry, offered_formats(target, entry), named=False) for entry in readable]
        return tuple(offer for offer in found if not _is_last_resort(offer)) or tuple(found)
    fitting = [entry for entry in containers_for(target, named) if entry in readable]
    if not fitting:
        raise InputError(_infeasible(target, readable, named))
    return tuple(Offer(entry, named) for entry in fitting)


def _is_last_resort(offer: Offer) -> bool:
    """Whether all of its formats are for whoever names them."""
    return all(FORMATS[name].when_named for name in offer.formats)


def best_offer(
    offered: Sequence[Offer], target: Target | None, model: nn.Module, model_map: ModelMap
) -> tuple[Offer, Unusable]:
    """The offer that quantises most weights of this model, and what it cannot take; ties: the first.

    compressed-tensors holds no fused experts that differ between layers, for example, so a mixture
    model that is to run in vLLM goes to modelopt even where the other container has a format more.
    """
    best: tuple[int, Offer, Unusable] | None = None
    for offer in offered:
        unusable = _unusable(offer, target, model, model_map)
        weights = _quantisable_weights(offer, unusable, model_map)
        if best is None or weights > best[0]:
            best = weights, offer, unusable
    if best is None:
        raise ValueError("offered must not be empty")
    return _without_useless(*best[1:], model_map)


def note_target(target: Target, offer: Offer, progress: Progress) -> None:
    """Say where the target takes what is searched, and which formats it runs otherwise."""
    names = ", ".join(offer.formats)
    progress.note(f"for {target}: {names} in the {offer.container} container")
    for name in offered_formats(target, offer.container):
        if not offer.named and name not in offer.formats:
            progress.note(f"{target} would run {name}, and no layer of this model can take it")
    further = [name for name in _quantised(target, offer.container) if FORMATS[name].when_named]
    if not offer.named and not set(further) & set(offer.formats) and further:
        progress.note(f"{target} runs {', '.join(further)}, too, where --formats names them")
    for name in offer.formats:
        found = support(target, offer.container, name)
        if found.verdict is Verdict.WEIGHT_ONLY:
            progress.note(
                f"{name} runs weight-only on {target} ({found.reason}); predicted and measured "
                "losses count the rounding of inputs, which does not happen there"
            )


def _unusable(
    offer: Offer, target: Target | None, model: nn.Module, model_map: ModelMap
) -> Unusable:
    unusable = inexpressible(model, model_map, offer.formats, offer.container)
    if target is not None:
        for cell, reason in _misfits(offer, target, model_map).items():
            unusable.setdefault(cell, reason)
    return unusable


def _without_useless(
    offer: Offer, unusable: Unusable, model_map: ModelMap
) -> tuple[Offer, Unusable]:
    """Formats that nobody named and no group can take are left out, unless none would be left."""
    useful = tuple(
        name
        for name in offer.formats
        if any((group.name, name) not in unusable for group in model_map.groups)
    )
    if offer.named or not useful:
        return offer, unusable
    kept = {cell: reason for cell, reason in unusable.items() if cell[1] in useful}
    return replace(offer, formats=useful), kept


def _misfits(offer: Offer, target: Target, model_map: ModelMap) -> Unusable:
    """Groups with a weight that the target does not take in a format."""
    found: Unusable = {}
    for fmt in offer.formats:
        entry = support(target, offer.container, fmt)
        for group in model_map.groups:
            for slot in (model_map.slots[name] for name in group.slots):
                reason = entry.misfit(slot.out_features, is_expert=slot.kind is SlotKind.EXPERT)
                if reason is not None:
                    found.setdefault((group.name, fmt), f"{target} {reason}: {slot.name}")
    return found


def _quantisable_weights(offer: Offer, unusable: Unusable, model_map: ModelMap) -> int:
    """Weights of the groups that can take at least one quantised format."""
    quantised = [name for name in offer.formats if name != NONE]
    return sum(
        model_map.slots[slot].weights
        for group in model_map.groups
        if any((group.name, fmt) not in unusable for fmt in quantised)
        for slot in group.slots
    )


def _quantised(target: Target, container: Container) -> tuple[FormatName, ...]:
    return tuple(name for name in feasible_formats(target, container) if name != NONE)


def _nothing_runs(target: Target) -> str:
    why = dict.fromkeys(reason for entry in Container for reason in reasons(target, entry).values())
    return f"{target} runs no quantised format: {'; '.join(why)}; `autoq targets` lists what runs where"


def _unreadable(target: Target, container: Container, readable: Sequence[Container]) -> str:
    why = "; ".join(dict.fromkeys(reasons(target, container).values()))
    return (
        f"{target} reads no quantised format from the {container} container: {why}; use "
        f"--container {readable[0]}"
    )


def _infeasible(
    target: Target, readable: Sequence[Container], formats: Sequence[FormatName]
) -> str:
    """Why no container that may be used takes all the formats; those that the best refuses."""
    refused = min((reasons(target, entry, formats) for entry in readable), key=len)
    why = "; ".join(
        f"{name} from {entry}: {support(target, entry, name).reason}"
        for name in refused
        for entry in readable
    )
    runs = "; ".join(f"from {entry} {', '.join(_quantised(target, entry))}" for entry in readable)
    return f"{target} does not run {' and '.join(refused)} ({why}); it runs {runs}"
