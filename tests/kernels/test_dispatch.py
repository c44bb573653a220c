from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch

from autoq.kernels import dispatch
from autoq.kernels.dispatch import OPERATIONS, Choice, Implementation, answers, choose
from autoq.kernels.targets import TARGETS

GPU = torch.device("cuda:0")

# Launched on behalf of several operations.
SHARED = {"split_k.reduce"}

# Operations that launch another's kernels; cases carry the other's name.
MADE_OF = {
    "fp8.linear": "fp8.matmul",
    "w4a8.quantize": "int4.quantize",
}


@pytest.fixture
def gpu(monkeypatch):
    """Let the GPU be of this target, or of none that is known."""

    def be(target):
        dispatch._choose_gpu.cache_clear()
        monkeypatch.setattr(dispatch, "target_of", lambda device: target)

    yield be
    dispatch._choose_gpu.cache_clear()


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cpu", "triton has no CPU backend"), ("mps", "there are no kernels for mps devices")],
)
def test_devices_without_kernels_take_torch(device, reason):
    assert choose(torch.device(device)) == Choice(Implementation.TORCH, reason)
    assert dispatch.triton_target(torch.device(device)) is None


def test_a_known_gpu_takes_triton(gpu):
    gpu(TARGETS["sm_90"])
    assert choose(GPU) == Choice(Implementation.TRITON, "kernels for sm_90")
    assert dispatch.triton_target(GPU) is TARGETS["sm_90"]


def test_an_unknown_gpu_takes_torch(gpu):
    gpu(None)
    assert choose(GPU).implementation is Implementation.TORCH
    assert dispatch.triton_target(GPU) is None


def test_a_gpu_without_triton_takes_torch_and_says_what_to_install(gpu, monkeypatch):
    gpu(TARGETS["sm_90"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(GPU).implementation is Implementation.TORCH
    assert "pip install 'autoq[triton]'" in choose(GPU).reason
    assert dispatch.triton_target(GPU) is None


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_a_function_of_its_family(operation):
    family, name = operation.split(".")
    assert callable(getattr(importlib.import_module(f"autoq.kernels.{family}"), name))


def test_answers_for_the_cpu_name_torch_and_what_is_compiled(monkeypatch):
    monkeypatch.setenv("AUTOQ_CPU_COMPILE", "auto")
    found = {answer.operation: answer.choice for answer in answers(torch.device("cpu"))}
    assert tuple(found) == OPERATIONS
    assert {choice.implementation for choice in found.values()} == {Implementation.TORCH}
    assert "compiled loops once that pays" in found["nvfp4.fake_quantize"].reason
    assert "compiled" not in found["nvfp4.quantize"].reason
    monkeypatch.setenv("AUTOQ_CPU_COMPILE", "never")
    found = {answer.operation: answer.choice for answer in answers(torch.device("cpu"))}
    assert "AUTOQ_CPU_COMPILE=never keeps" in found["nvfp4.fake_quantize"].reason


def test_answers_for_a_gpu_are_those_for_its_target(gpu):
    gpu(TARGETS["sm_90"])
    assert answers(GPU) == answers(TARGETS["sm_90"])


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_what_takes_triton_is_compiled_for_the_target(target):
    from autoq.kernels._compile_cases import compile_cases

    cases = {case.operation for case in compile_cases() if target in case.targets}
    for answer in answers(TARGETS[target]):
        if answer.choice.implementation is Implementation.TRITON:
            parts = {answer.operation, MADE_OF.get(answer.operation)}
            assert parts & cases, f"no compile case for {answer.operation}"


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_every_compile_case_is_of_a_known_operation():
    from autoq.kernels._compile_cases import compile_cases

    assert {case.operation for case in compile_cases()} <= {*OPERATIONS, *SHARED}
