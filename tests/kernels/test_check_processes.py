from __future__ import annotations

import sys
from dataclasses import replace

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


def test_results_come_back_and_a_process_that_dies_fails_its_launch_only():
    from autoq.kernels._compile_cases import compile_cases
    from autoq.kernels.check_processes import check_all

    case = next(case for case in compile_cases() if case.operation == "int8.dequantize")
    # A name that the worker does not know ends it.
    unknown = replace(case, variant="unknown")
    results = list(check_all([(case, "sm_80"), (unknown, "sm_90"), (case, "sm_100")], processes=1))
    assert [(result.variant, result.target) for result in results] == [
        (case.variant, "sm_80"),
        ("unknown", "sm_90"),
        (case.variant, "sm_100"),
    ]
    assert [len(result.kernels) for result in results] == [1, 0, 1]
    assert results[1].failures == ("the compiler ended its process with code 1",)
    assert results[0].failures == results[2].failures == ()
