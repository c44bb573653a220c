"""Layer types and depths, read off the names of decision groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.models import GroupName

_MOST_BANDS = 4

_MOST_CLASSES = 32
"""Layer types x depth bands: Optuna's samplers find little in spaces of more dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClasses:
    """The layer type of every group, and its class: type and depth band together."""

    types: NDArray[np.int64]  # [groups]
    classes: NDArray[np.int64]  # [groups]
    class_names: tuple[str, ...]  # by class


def layer_classes(groups: Sequence[GroupName]) -> LayerClasses:
    """Sort groups by type and by depth.

    The depth is the first number among the name's dotted parts, the type what follows it, as in
    `model.layers.7.mlp.down_proj`. A name without a number is a type of its own. Depths are cut
    into at most four bands of equally many layers, fewer where there are many types.
    """
    parsed = [_type_and_depth(name) for name in groups]
    type_names = sorted({kind for kind, _ in parsed})
    depths = sorted({depth for _, depth in parsed if depth is not None})
    bands = max(1, min(_MOST_BANDS, _MOST_CLASSES // len(type_names), len(depths)))
    rank = {depth: place * bands // len(depths) for place, depth in enumerate(depths)}
    named = [_class_name(kind, depth, rank, bands) for kind, depth in parsed]
    class_names = sorted(set(named))
    return LayerClasses(
        types=np.array([type_names.index(kind) for kind, _ in parsed], dtype=np.int64),
        classes=np.array([class_names.index(name) for name in named], dtype=np.int64),
        class_names=tuple(class_names),
    )


def _type_and_depth(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            kind = ".".join("*" if later.isdecimal() else later for later in parts[place + 1 :])
            return kind or ".".join(parts[:place]), int(part)
    return name, None


def _class_name(kind: str, depth: int | None, rank: dict[int, int], bands: int) -> str:
    return kind if depth is None or bands == 1 else f"{kind}, depth {rank[depth] + 1} of {bands}"
