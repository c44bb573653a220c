"""Finding every quantisable weight of a model by structure, and what to leave alone."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from autoq.errors import InputError
from autoq.models._types import (
    DecisionGroup,
    ExcludedSlot,
    ModelMap,
    SlotKind,
    SlotName,
    WeightSlot,
)
from autoq.models.families import (
    ABSORBED,
    EXPERT_PARAMETERS,
    OTHER_INPUT_PARTS,
    PLAIN_LINEAR_CLASSES,
    READ_AS_TENSORS,
    ROUTER_NAMES,
    is_cross_attention,
)
from autoq.models.grouping import form_groups

_HEAD_REASON = "output head: left in the model's dtype unless included by name"
_TIED_HEAD_REASON = (
    "output head tied to the embedding {embedding}: both share one tensor, and embeddings are "
    "looked up, not multiplied"
)
_ROUTER_REASON = "router: a changed choice of experts costs more than its few weights save"
_OTHER_INPUTS_REASON = (
    "encodes images or sounds, which calibration text has none of: left in the model's dtype unless "
    "included by name"
)
_CROSS_ATTENTION_REASON = (
    "attends to what an encoder saw, which calibration text never reaches: left in the model's dtype "
    "unless included by name"
)
_OWN_ROUTER_REASON = "router of class {cls}, not nn.Linear: cannot be quantised"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A weight that could be a slot, and why it is none, if so."""

    slot: WeightSlot
    parameter: Tensor
    reason: str | None = None  # left out for this
    includable: bool = False  # unless the user includes it


def discover(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ModelMap:
    """Find the weights that can be quantised, and form the groups that search decides on.

    Args:
        model: any torch module; output head and tied weights are known for transformers models.
        include: globs over module names that bring back the output head, routers, what encodes
            images or sounds, and what engines absorb.
        exclude: globs over slot and module names to leave alone. A pattern that matches one member
            of a group leaves out the whole group.
    Raises:
        InputError: a pattern matches nothing; the message lists near misses.
    """
    unread = _parts_that_text_never_reaches(model)
    candidates = [_kept_out(candidate, unread) for candidate in _candidates(model)]
    names = {name for c in candidates for name in (str(c.slot.name), c.slot.module)}
    _check_patterns("include", include, names)
    taken = [c for c in candidates if c.reason is None or _is_brought_back(c, include)]
    taken_names = {c.slot.name for c in taken}
    excluded = [
        _left_out(c.slot, str(c.reason)) for c in candidates if c.slot.name not in taken_names
    ]
    groups = form_groups([(c.slot, c.parameter) for c in taken])
    _check_patterns("exclude", exclude, names | {group.name for group in groups})
    slots = {c.slot.name: c.slot for c in taken}
    kept, dropped = _split_groups(groups, slots, exclude)
    return ModelMap(
        architecture=type(model).__name__,
        slots={name: slots[name] for group in kept for name in group.slots},
        groups=tuple(kept),
        excluded=tuple(excluded + dropped),
        blocks=tuple(
            _blocks(model, {c.slot.module for c in candidates if _runs(c, taken_names, unread)})
        ),
    )


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    head = _output_head(model)
    embeddings: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.setdefault(id(module.weight), path)
    mixtures = _mixture_parents(model)
    for path, module in model.named_modules():
        if _is_fused_experts(module):
            yield from _expert_candidates(path, module)
        elif _is_router(path, module, mixtures):
            yield _router_candidate(path, module)
        elif head is not None and module is head:
            yield _head_candidate(path, module, embeddings.get(id(_weight(module))))
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            yield _linear_candidate(path, module)


def _kept_out(candidate: _Candidate, unread: Mapping[str, str]) -> _Candidate:
    """The candidate, with the reason if its place in the model is one."""
    reason = unread.get(_part_of(candidate.slot.module, unread))
    if candidate.reason is None and reason is not None:
        return replace(candidate, reason=reason, includable=True)
    return candidate


def _runs(candidate: _Candidate, taken: Container[SlotName], unread: Container[str]) -> bool:
    """Whether a forward pass over text runs it, or somebody brought it back."""
    return candidate.slot.name in taken or not _part_of(candidate.slot.module, unread)


def _part_of(path: str, parts: Container[str]) -> str:
    """The outermost of `parts` that the path lies in, or ""."""
    names = path.split(".")
    above = (".".join(names[:count]) for count in range(1, len(names) + 1))
    return next((part for part in above if part in parts), "")


def _parts_that_text_never_reaches(model: nn.Module) -> dict[str, str]:
    """Paths of modules that a forward pass over token ids does not run -> why."""
    found: dict[str, str] = {}
    has_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for path, _ in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in OTHER_INPUT_PARTS:
            found[path] = _OTHER_INPUTS_REASON
        elif is_cross_attention(name) and not has_encoder:
            others = [child for child, _ in model.get_submodule(parent).named_children()]
            alone = not any(
                "att" in child for child in others if child != name and "norm" not in child
            )
            # Without attention of its own, a layer has nothing to do with the text.
            found[parent if alone else path] = _CROSS_ATTENTION_REASON
    return found


def _linear_candidate(path: str, module: nn.Module) -> _Candidate:
    leaf = path.rpartition(".")[2]
    if leaf in ABSORBED:
        slot = _matrix_slot(path, module)
        return _Candidate(slot, _weight(module), ABSORBED[leaf], includable=True)
    reason = READ_AS_TENSORS.get(leaf)
    overridden = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    overridden = overridden and type(module).__name__ not in PLAIN_LINEAR_CLASSES
    if overridden or type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        reason = f"of class {type(module).__name__}, which multiplies in its own way"
    return _Candidate(_matrix_slot(path, module), _weight(module), reason)


def _head_candidate(path: str, module: nn.Module, embedding: str | None) -> _Candidate:
    slot = _matrix_slot(path, module)
    if embedding is not None:
        return _Candidate(slot, _weight(module), _TIED_HEAD_REASON.format(embedding=embedding))
    return _Candidate(slot, _weight(module), _HEAD_REASON, includable=True)


def _router_candidate(path: str, module: nn.Module) -> _Candidate:
    slot = _matrix_slot(path, module)
    if isinstance(module, nn.Linear):
        return _Candidate(slot, _weight(module), _ROUTER_REASON, includable=True)
    return _Candidate(slot, _weight(module), _OWN_ROUTER_REASON.format(cls=type(module).__name__))


def _expert_candidates(path: str, module: nn.Module) -> Iterator[_Candidate]:
    reason = None
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        reason = f"experts of class {type(module).__name__} are stored transposed or interleaved"
    elif "top_k_index" not in inspect.signature(type(module).forward).parameters:
        reason = f"experts of class {type(module).__name__} multiply in their own way"
    for expert in range(_expert_parameters(module)[0][1].shape[0]):
        for name, parameter in _expert_parameters(module):
            slot = WeightSlot(
                name=SlotName(f"{path}.{expert}.{name}"),
                module=path,
                parameter=name,
                kind=SlotKind.EXPERT,
                out_features=parameter.shape[1],
                in_features=parameter.shape[2],
                expert=expert,
            )
            yield _Candidate(slot, parameter, reason)


def _matrix_slot(path: str, module: nn.Module) -> WeightSlot:
    rows, columns = _weight(module).shape
    transposed = _is_conv1d(module)
    return WeightSlot(
        name=SlotName(path),
        module=path,
        parameter="weight",
        kind=SlotKind.CONV1D if transposed else SlotKind.LINEAR,
        out_features=columns if transposed else rows,
        in_features=rows if transposed else columns,
    )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_conv1d(module: nn.Module) -> bool:
    # By name and shape, as importing transformers takes seconds.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _expert_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = dict(module.named_parameters(recurse=False))
    return [(name, own[name]) for name in EXPERT_PARAMETERS if name in own and own[name].ndim == 3]


def _is_fused_experts(module: nn.Module) -> bool:
    return bool(_expert_parameters(module))


def _mixture_parents(model: nn.Module) -> set[str]:
    """Paths of the modules that hold experts: those beside which a router stands."""
    parents = set()
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if _is_fused_experts(module) or (name == "experts" and any(module.children())):
            parents.add(parent)
    return parents


def _is_router(path: str, module: nn.Module, mixtures: set[str]) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return False
    parts = path.split(".")
    return any(
        part in ROUTER_NAMES and ".".join(parts[:position]) in mixtures
        for position, part in enumerate(parts)
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Linear) else None


def _is_brought_back(candidate: _Candidate, include: Sequence[str]) -> bool:
    return candidate.includable and any(_matches(pattern, candidate.slot) for pattern in include)


def _left_out(slot: WeightSlot, reason: str) -> ExcludedSlot:
    return ExcludedSlot(name=slot.name, reason=reason, weights=slot.weights)


def _split_groups(
    groups: Iterable[DecisionGroup], slots: dict[SlotName, WeightSlot], exclude: Sequence[str]
) -> tuple[list[DecisionGroup], list[ExcludedSlot]]:
    """Groups to search, and the slots of those that a pattern leaves out."""
    kept: list[DecisionGroup] = []
    dropped: list[ExcludedSlot] = []
    for group in groups:
        pattern, hit = _first_group_match(exclude, group, slots)
        if pattern is None:
            kept.append(group)
            continue
        for name in group.slots:
            shared = "" if hit in (None, name) else f" through {hit}, as {group.reason}"
            reason = f"excluded by pattern {pattern!r}{shared}"
            dropped.append(_left_out(slots[name], reason))
    return kept, dropped


def _first_group_match(
    patterns: Sequence[str], group: DecisionGroup, slots: dict[SlotName, WeightSlot]
) -> tuple[str | None, SlotName | None]:
    """The first pattern that matches the group or a member, and that member, if one."""
    for pattern in patterns:
        if fnmatchcase(group.name, pattern):
            return pattern, None
        for name in group.slots:
            if _matches(pattern, slots[name]):
                return pattern, name
    return None, None


def _matches(pattern: str, slot: WeightSlot) -> bool:
    return fnmatchcase(slot.name, pattern) or fnmatchcase(slot.module, pattern)


def _check_patterns(option: str, patterns: Sequence[str], names: set[str]) -> None:
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        close = ", ".join(difflib.get_close_matches(pattern, sorted(names), cutoff=0.5))
        hint = f"did you mean {close}?" if close else f"names look like {min(names, default='')!r}"
        raise InputError(
            f"a pattern to {option} must match a layer, and {pattern!r} matches none; {hint} "
            "(whole names are compared: write '*.q_proj' or 'model.layers.0.*')"
        )


def _blocks(model: nn.Module, modules_with_weights: set[str]) -> Iterator[str]:
    """Paths of the layers in the outermost lists of like layers, in order."""
    outer: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{parent}.") for parent in outer)
        if inside or not isinstance(module, nn.ModuleList) or not _are_like_layers(module):
            continue
        children = [f"{path}.{name}" for name, _ in module.named_children()]
        holding = [c for c in children if _holds_weights(c, modules_with_weights)]
        if holding:
            outer.append(path)
            yield from holding


def _are_like_layers(layers: nn.ModuleList) -> bool:
    # Hybrid models mix classes of layers; transformers marks them all with one base class.
    classes = {type(layer) for layer in layers}
    marked = all(
        any(base.__name__ == "GradientCheckpointingLayer" for base in cls.__mro__)
        for cls in classes
    )
    return (len(classes) == 1 or marked) and all(any(layer.children()) for layer in layers)


def _holds_weights(path: str, modules_with_weights: set[str]) -> bool:
    return any(module.startswith(f"{path}.") for module in modules_with_weights)
