"""Compiling without a GPU, and the checks on what comes out, each shown to find what it is for."""

from __future__ import annotations

import os
import re
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is for Linux")
import triton.language as tl

from autoq.kernels import ahead_of_time
from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels.ahead_of_time import compile_launches, launched_kernels
from autoq.kernels.compile_check import check, contractions, fused_operations, instructions
from autoq.kernels.targets import TARGETS

SM_90 = TARGETS["sm_90"]


@triton.jit
def _scaled_sum_kernel(x_ptr, y_ptr, out_ptr, KIND: tl.constexpr):
    places = tl.arange(0, 128)
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    if KIND == "contracted":
        result = x * y + 1.0
    elif KIND == "fused":
        result = tl.fma(x, y, y)
    elif KIND == "approximate":
        result = x / y
    else:
        result = tl.math.div_rn(x, y)
    tl.store(out_ptr + places, result)


@triton.jit
def _large_tile_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    rows, inner = tl.arange(0, SIZE), tl.arange(0, 64)
    x = tl.load(x_ptr + rows[:, None] * 64 + inner[None, :])
    sums = tl.dot(x, tl.trans(x))
    tl.store(out_ptr + rows[:, None] * SIZE + rows[None, :], sums)


def _scaled_sum(kind: str, target: object = None) -> None:
    operand = torch.empty(128, device="meta")
    _scaled_sum_kernel[(1,)](operand, operand, operand, KIND=kind)


def _large_tile(size: int, target: object = None) -> None:
    x = torch.empty(size, 64, dtype=torch.float16, device="meta")
    out = torch.empty(size, size, device="meta")
    _large_tile_kernel[(1,)](x, out, SIZE=size, num_warps=4)


def _case(launch, **expected) -> CompileCase:
    return CompileCase(operation="test", variant="one", launch=launch, **expected)


def test_a_launch_compiles_for_every_target_in_one_process():
    for target in TARGETS.values():
        (kernel,) = compile_launches(target, partial(_scaled_sum, "divided"))
        assert kernel.name == "_scaled_sum_kernel"
        assert kernel.registers > 0
        assert kernel.spill_bytes == 0
        code = target.architecture if target.backend == "hip" else f".target {target.name}"
        assert str(code) in kernel.assembly


@pytest.mark.parametrize("before", [None, object()], ids=["none", "one"])
def test_the_driver_is_as_before_afterwards(before, monkeypatch):
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", before)
    compile_launches(SM_90, partial(_scaled_sum, "divided"))
    assert driver._active is before
    with pytest.raises(ZeroDivisionError):
        compile_launches(SM_90, lambda: 1 / 0)
    assert driver._active is before


def test_launched_kernels_are_named_and_not_compiled(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_described", None)
    names = launched_kernels(SM_90, partial(_scaled_sum, "divided"))
    assert names == [f"{__name__}._scaled_sum_kernel"]


def test_a_good_launch_has_no_failures():
    case = _case(partial(_large_tile, 64), instructions={"sm_90": r"wgmma\.mma_async"})
    found = check(case, SM_90)
    assert found.failures == ()
    (kernel,) = found.kernels
    assert kernel.instructions == ("wgmma f16",)
    assert kernel.shared_memory_bytes > 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param(_case(lambda target: None), "nothing was launched", id="no_launch"),
        pytest.param(
            _case(partial(_scaled_sum, "approximate")), "approximately: div.full", id="approximate"
        ),
        pytest.param(
            _case(partial(_large_tile, 64), instructions={"sm_90": "e4m3"}),
            "no instruction matches e4m3",
            id="instruction",
        ),
        pytest.param(_case(partial(_large_tile, 256)), r"spills \d+ bytes, 0 are", id="spills"),
        pytest.param(_case(partial(_large_tile, 96)), "CompilationError", id="does_not_compile"),
    ],
)
def test_what_is_not_as_it_must_be_is_said(case, message):
    (failure, *_) = check(case, SM_90).failures
    assert re.search(message, failure), failure


def test_known_spills_are_allowed_for_one_triton():
    version = ".".join(triton.__version__.split(".")[:2])
    target = TARGETS["sm_89"]

    def failures(allowed_for: str) -> tuple[str, ...]:
        allowed = {(target.name, allowed_for): 10**6}
        return check(_case(partial(_large_tile, 256), allowed_spill_bytes=allowed), target).failures

    assert failures(version) == ()
    assert "spills" in failures("0.1")[0]


def test_products_that_wait_for_each_other_are_reported():
    failures = check(_case(partial(_large_tile, 256)), SM_90).failures
    assert any("wgmma.mma_async instructions are serialized" in failure for failure in failures)


def test_contractions_are_found_and_written_fused_operations_are_not():
    (found,) = contractions(_case(partial(_scaled_sum, "contracted")), SM_90)
    assert found.startswith("_scaled_sum_kernel: 1 fused operations, 0 are written")
    assert contractions(_case(partial(_scaled_sum, "fused")), SM_90) == []
    assert contractions(_case(partial(_scaled_sum, "divided")), SM_90) == []


def test_fused_operations_are_counted_and_constants_that_are_loaded_are_not():
    assembly = """
        /*0040*/                   HFMA2.MMA R20, -RZ, RZ, 1.875, 0 ;
        /*0050*/              @!P0 FFMA R1, R2, R3, RZ ;
        /*0060*/                   FFMA.FTZ R1, -RZ, R3, R4 ;
        /*0070*/                   HFMA2 R1, R2.H0_H0, R3, R4 ;
        /*0080*/                   DFMA R2, R4, R6, R8 ;
        /*0090*/                   FMUL R1, R2, R3 ;
    """
    assert fused_operations(assembly) == 4


def test_contractions_leave_the_environment_alone(monkeypatch):
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    contractions(_case(partial(_scaled_sum, "fused")), SM_90)
    assert "TRITON_DEFAULT_FP_FUSION" not in os.environ


@pytest.mark.parametrize(
    ("assembly", "names"),
    [
        ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {", ("wgmma e4m3",)),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {", ("wgmma bf16",)),
        ("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {", ("wgmma s8",)),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4 [", ("tcgen05 f8f6f4",)),
        (
            "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X",
            ("tcgen05 mxf4nvf4",),
        ),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {", ("mma.sync e4m3",)),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {", ("mma.sync s8",)),
        (
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1",
            ("mma.sync mxf4nvf4",),
        ),
        ("v_mfma_f32_32x32x16_fp8_fp8 v[0:15]", ("mfma 32x32x16_fp8_fp8",)),
        ("cvt.rn.satfinite.e4m3x2.f32 %rs1", ("cvt e4m3x2",)),
        ("cvt.rn.satfinite.e2m1x2.f32 byte", ("cvt e2m1x2",)),
        ("add.f32 %f1, %f2, %f3;", ()),
    ],
)
def test_units_are_told_from_the_assembly(assembly, names):
    assert instructions(assembly) == names
