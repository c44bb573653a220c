"""Every launch of every kernel, compiled for every target that it is shipped for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import pytest
from triton.runtime import JITFunction

from autoq.kernels import _jit
from autoq.kernels._compile_cases import compile_cases
from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels.ahead_of_time import launched_kernels
from autoq.kernels.compile_check import check, contractions
from autoq.kernels.targets import TARGETS, Target

# These promise bits, so the compiler must have no choice in them. Matrix products do not: their
# sums are in an order that the hardware chooses.
EXACT = ("quantize", "dequantize", "fake_quantize")


@dataclass(frozen=True)
class Launch:
    """A case for one target, and the kernels that it starts there."""

    case: CompileCase
    target: Target
    kernels: tuple[str, ...]


def _launch(case: CompileCase, target: Target) -> Launch:
    return Launch(case, target, tuple(launched_kernels(target, partial(case.launch, target))))


LAUNCHES = [_launch(case, TARGETS[name]) for case in compile_cases() for name in case.targets]


def _parameters(launches: Iterable[Launch]) -> list:
    """The launches; all but the first of the same kernels for a target are marked slow."""
    seen, parameters = set(), []
    for launch in launches:
        key = (launch.target.name, launch.kernels)
        marks = [pytest.mark.slow] if key in seen else []
        seen.add(key)
        name = f"{launch.case.name} for {launch.target.name}"
        parameters.append(pytest.param(launch, id=name, marks=marks))
    return parameters


@pytest.mark.parametrize("launch", _parameters(LAUNCHES))
def test_launch_compiles_as_it_must(launch):
    assert not check(launch.case, launch.target).failures


@pytest.mark.parametrize(
    "launch",
    _parameters(
        launch
        for launch in LAUNCHES
        if launch.target.name == "sm_90" and launch.case.operation.partition(".")[2] in EXACT
    ),
)
def test_no_product_and_sum_are_fused_where_bits_are_promised(launch):
    assert not contractions(launch.case, launch.target)


def test_every_kernel_is_launched_by_a_case():
    launched = {kernel for launch in LAUNCHES for kernel in launch.kernels}
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
