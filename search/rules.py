"""User rules: which formats the groups that match a pattern may take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError, UnknownNameError
from autoq.formats import FORMATS, NONE, FormatName
from autoq.models import DecisionGroup, GroupName, ModelMap
from autoq.search._types import CostTable
from autoq.search.costs import refusals

_SHAPE = "'PATTERN=FORMAT[,FORMAT...]'"
_EXAMPLE = "'model.layers.0.*=none'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The groups that match `pattern` may take only `formats`.

    `pattern` is a shell glob, case-sensitive, in which `*` also spans dots. It is compared with
    the names of groups, slots and modules; one matching member binds its whole group.
    """

    pattern: str
    formats: tuple[FormatName, ...]

    def __str__(self) -> str:
        return f"{self.pattern}={','.join(self.formats)}"


def parse_rule(text: str) -> Rule:
    """Read a rule such as `model.layers.0.*=none` or `*down_proj=fp8,none`.

    Raises:
        InputError: the text is not of that shape.
        UnknownNameError: a format is not registered; the message lists near misses.
    """
    pattern, equals, formats = (part.strip() for part in text.rpartition("="))
    names = [name.strip() for name in formats.split(",")]
    if not equals or not pattern or not all(names):
        raise InputError(f"a rule must look like {_SHAPE}, got {text!r}; for example {_EXAMPLE}")
    for name in names:
        _check_registered(name, text)
    return Rule(pattern=pattern, formats=tuple(dict.fromkeys(map(FormatName, names))))


def apply_rules(costs: CostTable, model_map: ModelMap, rules: Sequence[Rule]) -> CostTable:
    """`costs` with `allowed` restricted by `rules`; several rules on one group all hold.

    Raises:
        InputError: a rule matches nothing, names a format that is not searched, or leaves a group
            without any format.
    """
    allowed = costs.allowed.copy()
    for rule in rules:
        _check_searched(rule, costs)
        matched = _matching_groups(rule, model_map)
        if not matched and not _keeps_excluded_as_is(rule, model_map):
            raise InputError(_nothing_matches(rule, model_map))
        rows = np.array([group in matched for group in costs.groups], dtype=np.bool_)
        permitted = np.array([name in rule.formats for name in costs.formats], dtype=np.bool_)
        allowed[rows] &= permitted
        _check_not_emptied(rule, allowed, costs, model_map)
    return replace(costs, allowed=allowed)


def _check_registered(name: str, text: str) -> None:
    try:
        FORMATS[name]
    except UnknownNameError as error:
        raise UnknownNameError(f"rule {text!r}: {error}") from None


def _check_searched(rule: Rule, costs: CostTable) -> None:
    for name in rule.formats:
        if name not in costs.formats:
            raise InputError(
                f"rule '{rule}' may name only formats of this search "
                f"({', '.join(costs.formats)}), got {name!r}; add it to --formats or leave it out "
                "of the rule"
            )


def _check_not_emptied(
    rule: Rule, allowed: NDArray[np.bool_], costs: CostTable, model_map: ModelMap
) -> None:
    emptied = np.flatnonzero(~allowed.any(axis=1))
    if not emptied.size:
        return
    group = costs.groups[int(emptied[0])]
    reasons = refusals(model_map, rule.formats)
    shapes = [reasons[group, name] for name in rule.formats if (group, name) in reasons]
    cause = "; ".join(shapes) or "an earlier rule forbids what this one allows"
    raise InputError(
        f"rule '{rule}' leaves group {group!r} without any format ({cause}); "
        "add none to the rule, or narrow its pattern"
    )


def _matching_groups(rule: Rule, model_map: ModelMap) -> set[GroupName]:
    return {
        group.name
        for group in model_map.groups
        if _any_matches(rule.pattern, _names_of(group, model_map))
    }


def _names_of(group: DecisionGroup, model_map: ModelMap) -> set[str]:
    modules = {model_map.slots[slot].module for slot in group.slots}
    return {group.name, *group.slots, *modules}


def _any_matches(pattern: str, names: Iterable[str]) -> bool:
    # Equality first: a name may itself hold the characters that globs treat as special.
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def _keeps_excluded_as_is(rule: Rule, model_map: ModelMap) -> bool:
    """Whether the rule only asks for what exclusion already does, as `lm_head=none` often does."""
    excluded = [slot.name for slot in model_map.excluded]
    return rule.formats == (NONE,) and _any_matches(rule.pattern, excluded)


def _nothing_matches(rule: Rule, model_map: ModelMap) -> str:
    for slot in model_map.excluded:
        if _any_matches(rule.pattern, [slot.name]):
            return (
                f"rule '{rule}' must match something that is searched, got only {slot.name!r}, "
                f"which is excluded ({slot.reason}); include it in the search or drop the rule"
            )
    close = difflib.get_close_matches(rule.pattern, _patterns_that_match(model_map), n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else "list the names with `autoq show`"
    return (
        f"rule '{rule}' must match at least one group, weight or module, got no match for "
        f"{rule.pattern!r}; {hint}"
    )


def _patterns_that_match(model_map: ModelMap) -> list[str]:
    """Names, their dotted beginnings with `.*`, and `*` with their last part, without repeats."""
    patterns: dict[str, None] = {}
    for group in model_map.groups:
        modules = sorted({model_map.slots[slot].module for slot in group.slots})
        for name in (group.name, *modules):
            patterns[name] = None
            parts = name.split(".")
            for end in range(1, len(parts)):
                patterns[".".join(parts[:end]) + ".*"] = None
            patterns["*" + parts[-1]] = None
    return list(patterns)
