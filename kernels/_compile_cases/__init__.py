"""What `autoq kernels check` and the tests compile: every launch, on meta tensors, per target."""

from __future__ import annotations

import importlib
import pkgutil

from autoq.kernels._compile_cases.case import CompileCase


def compile_cases() -> list[CompileCase]:
    """The cases of every module here, in the order of their names.

    Raises:
        ImportError: a module, or triton, cannot be imported.
        ValueError: two cases have one name.
    """
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    cases = [
        case
        for name in modules
        if name != "case"
        for case in importlib.import_module(f"{__name__}.{name}").CASES
    ]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two compile cases have one name: {', '.join(twice)}")
    return cases
