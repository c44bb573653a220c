"""Names of a package that load the module they lie in when they are first used (PEP 562).

Reading a study needs neither torch nor transformers, and whoever only reads should not wait for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names_from(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Nothing is kept: what a test puts in the place of a name in its module counts at once. A name
    must not be that of a module of the package, which would take its place.

    Args:
        package: its `__name__`.
        modules: module -> names that lie in it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return get
