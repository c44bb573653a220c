"""Every launch of every kernel, compiled for every target that it is shipped for."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import partial

import pytest
from triton.runtime import JITFunction

from autoq.kernels import _jit
from autoq.kernels._compile_cases import compile_cases
from autoq.kernels.ahead_of_time import launched_kernels
from autoq.kernels.compile_check import check, contractions
from autoq.kernels.targets import TARGETS

CASES = compile_cases()

# These promise bits, so the compiler must have no choice in them. Matrix products do not: their
# sums are in an order that the hardware chooses.
EXACT = ("quantize", "dequantize", "fake_quantize")


def _launches(cases) -> list:
    """Cases with targets; all but an operation's first for a target are marked slow."""
    seen, launches = set(), []
    for case in cases:
        for target in case.targets:
            first = (case.operation, target) not in seen
            seen.add((case.operation, target))
            launches.append(
                pytest.param(
                    case,
                    TARGETS[target],
                    id=f"{case.name} for {target}",
                    marks=() if first else pytest.mark.slow,
                )
            )
    return launches


@pytest.mark.parametrize(("case", "target"), _launches(CASES))
def test_launch_compiles_as_it_must(case, target):
    assert not check(case, target).failures


@pytest.mark.parametrize(
    ("case", "target"),
    _launches(
        replace(case, targets=("sm_90",))
        for case in CASES
        if case.operation.partition(".")[2] in EXACT and "sm_90" in case.targets
    ),
)
def test_no_product_and_sum_are_fused_where_bits_are_promised(case, target):
    assert not contractions(case, target)


def test_every_kernel_is_launched_by_a_case():
    launched = {
        kernel
        for case in CASES
        for name in case.targets
        for kernel in launched_kernels(TARGETS[name], partial(case.launch, TARGETS[name]))
    }
    assert sorted(_public_kernels() - launched) == []


def _public_kernels() -> set[str]:
    """Module and name of everything in _jit that a launch can start."""
    names = [module.name for module in pkgutil.iter_modules(_jit.__path__)]
    modules = [importlib.import_module(f"{_jit.__name__}.{name}") for name in names]
    return {
        f"{value.__module__}.{value.__name__}"
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
