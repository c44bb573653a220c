"""Every format in every container that can express it: one record each, a module per family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from autoq.export._layouts._types import Layout, LayoutKey, TensorRule
from autoq.export._layouts.fp8 import FP8
from autoq.export._layouts.int4 import INT4, WITHOUT_INT4
from autoq.export._layouts.int8 import INT8, WITHOUT_INT8
from autoq.export._layouts.mx import MX, WITHOUT_MX
from autoq.export._layouts.nvfp4 import NVFP4
from autoq.export._layouts.svdquant import SVDQUANT, WITHOUT_SVDQUANT
from autoq.formats import NONE, Container, FormatName

__all__ = [
    "LAYOUTS",
    "WITHOUT_LAYOUT",
    "Layout",
    "TensorRule",
    "first_container",
    "is_held",
    "manifest_entries",
]

LAYOUTS: Mapping[LayoutKey, Layout] = MappingProxyType(
    {**FP8, **NVFP4, **INT4, **INT8, **MX, **SVDQUANT}
)
"""A format is in here or in `WITHOUT_LAYOUT`, for each container."""

WITHOUT_LAYOUT: Mapping[LayoutKey, str] = MappingProxyType(
    {**WITHOUT_INT4, **WITHOUT_INT8, **WITHOUT_MX, **WITHOUT_SVDQUANT}
)
"""Why a container cannot express a format, and what can; one clause."""


def manifest_entries(container: Container) -> dict[FormatName, Mapping[str, Any]]:
    """Format -> what a manifest of the container says of it."""
    return {fmt: layout.manifest for (where, fmt), layout in LAYOUTS.items() if where is container}


def is_held(fmt: FormatName) -> bool:
    """Whether any container can express a format; others are searched and measured alone."""
    return any((container, fmt) in LAYOUTS for container in Container)


def first_container(formats: Sequence[FormatName]) -> Container | None:
    """The first container that can express all of the formats that any can; None if there is none."""
    wanted = [name for name in formats if name != NONE and is_held(name)]
    fitting = (
        container for container in Container if all((container, name) in LAYOUTS for name in wanted)
    )
    return next(fitting, None)
