"""What `autoq kernels check` and the tests compile: every launch, on meta tensors, per target."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

from autoq.kernels._compile_cases.case import CompileCase


def compile_cases() -> list[CompileCase]:
    """The cases of every module here, in the order of their names.

    Raises:
        ImportError: a module, or triton, cannot be imported.
        ValueError: two cases for one target have one name.
    """
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    cases = [
        case
        for name in modules
        if name != "case"
        for case in importlib.import_module(f"{__name__}.{name}").CASES
    ]
    counts = Counter((case.name, target) for case in cases for target in case.targets)
    for (name, target), count in counts.items():
        if count > 1:
            raise ValueError(f"{count} compile cases for {target} are called {name}")
    return cases
