"""autoq decides, layer by layer, in which number format a language model is stored and run.

The names here load what they need when they are first used, so that importing autoq is fast.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.api import Study, auto_quantize, evaluate, list_studies, load, open_study, search
    from autoq.client import Client

try:
    __version__ = version("autoq")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Client",
    "Study",
    "auto_quantize",
    "evaluate",
    "list_studies",
    "load",
    "open_study",
    "search",
]

_HOMES = dict.fromkeys(__all__, "autoq.api") | {"Client": "autoq.client"}


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("autoq.search")  # a package that answers calls
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'autoq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
