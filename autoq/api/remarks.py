"""What a search says aloud before it begins, and what it refuses by name."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.api.config import ScoringConfig
from autoq.api.study import Study
from autoq.api.task import LoadedModel
from autoq.errors import ExportError, InputError
from autoq.export import is_held
from autoq.formats import FORMATS, NONE, Container
from autoq.models import ModelMap
from autoq.progress import Progress


def note_narrow_formats(config: ScoringConfig, progress: Progress, *, named: bool) -> None:
    """Say where formats load that not every engine does, and which container that leads to.

    Args:
        named: whether the user named the container.
    """
    if not named and config.container is not Container.MODELOPT:
        progress.note(f"aiming at {config.container}, the container that holds these formats")
    for name in config.formats:
        if not FORMATS[name].portable:
            progress.note(f"{name} is not portable: it loads in {FORMATS[name].loads_in}")


def note_shorter_sequences(loaded: LoadedModel, config: ScoringConfig, progress: Progress) -> None:
    longest = loaded.longest_sequence
    if longest is not None and longest < config.sequence_length:
        progress.note(f"sequences have {longest} tokens: the model has no more positions")


def note_other_versions(study: Study, progress: Progress) -> None:
    before, now = study.record.versions, installed_versions()
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) != now[name]
    ]
    if changed:
        progress.note(
            f"study {study.name} was begun with other versions ({', '.join(changed)}); what it "
            "has stored stays, and the rest may differ in the last bits"
        )


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("autoq", "torch", "transformers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def refuse_useless_formats(
    model_map: ModelMap, config: ScoringConfig, unusable: Mapping[tuple[Any, Any], str]
) -> None:
    """A format that the container can hold for no group at all is refused by name."""
    for fmt in config.formats:
        reasons = [unusable.get((group.name, fmt)) for group in model_map.groups]
        if fmt != NONE and reasons and all(reasons):
            raise ExportError(
                f"the {config.container.value} container can hold no layer of this model in {fmt}: "
                f"{reasons[0]}"
            )


def refuse_unwritable_formats(config: ScoringConfig) -> None:
    """A search that is to end with a checkpoint is not begun with a format that none can hold.

    Raises:
        InputError: names it.
    """
    for fmt in config.formats:
        if fmt != NONE and not is_held(fmt):
            raise InputError(
                f"formats of a search that exports must be held by a container, and no container has a "
                f"place for {fmt}; leave out --export to search and measure it, or leave out {fmt}"
            )


def note_silent_groups(
    model_map: ModelMap, contributions: NDArray[np.float64], progress: Progress
) -> None:
    """Say which groups have scores of exactly zero: it may be the estimator that is blind.

    Args:
        contributions: [sequences, groups, formats]; NaN where a group cannot take a format.
    """
    usable = ~np.isnan(contributions).all(axis=(0, 2))
    silent = usable & ~np.nan_to_num(contributions).any(axis=(0, 2))
    names = [model_map.groups[row].name for row in np.flatnonzero(silent)]
    if names:
        progress.note(
            f"{len(names)} of {len(model_map.groups)} groups score exactly zero in every format; "
            f"the first is {names[0]}: no token reaches it, or its output is not used, or an "
            "operation behind it, such as rounding, has a gradient of zero everywhere; "
            "--estimator forward_only measures it"
        )


def note_lost_groups(
    model_map: ModelMap,
    config: ScoringConfig,
    unusable: Mapping[tuple[Any, Any], str],
    progress: Progress,
) -> None:
    """Say which groups the container keeps unquantised: it may be most of the weights."""
    quantised = [fmt for fmt in config.formats if fmt != NONE]
    lost = [
        group.name
        for group in model_map.groups
        if all((group.name, fmt) in unusable for fmt in quantised)
    ]
    if lost:
        progress.note(
            f"the {config.container.value} container keeps {len(lost)} of "
            f"{len(model_map.groups)} groups unquantised; the first is {lost[0]}: "
            f"{unusable[lost[0], quantised[0]]}"
        )
