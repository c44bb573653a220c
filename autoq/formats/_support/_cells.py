"""What the families' records of support are made of: generations, engines, reasons they share.

Compute capabilities are times ten. None is a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TypeAlias

from autoq.formats._container import Container
from autoq.formats._format import FormatName
from autoq.formats._places import Support, Verdict

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
NATIVE, WEIGHT_ONLY, EMULATED, NO = (
    Verdict.NATIVE,
    Verdict.WEIGHT_ONLY,
    Verdict.EMULATED,
    Verdict.NO,
)

TURING, AMPERE, ADA, HOPPER = (75,), (80, 86), (89,), (90,)
BLACKWELL = (100, 103, 120)
GPUS = TURING + AMPERE + ADA + HOPPER + BLACKWELL
FROM_AMPERE = AMPERE + ADA + HOPPER + BLACKWELL
FROM_ADA = ADA + HOPPER + BLACKWELL
CPU = (None,)

VLLM = ("vllm", "vLLM 0.33's own code, asked on a CPU; its kernels were not run")
SGLANG = ("sglang", "SGLang 0.5.23's own code, asked on a CPU; its kernels were not run")
TENSORRT = (
    "tensorrt-llm",
    "TensorRT-LLM's documentation and source of about 1.2: read, not run",
)
TRANSFORMERS = ("transformers", "transformers 5.23 with compressed-tensors 0.20: executed on a CPU")
"""Engine and what its records rest on."""

FP8_UNITS = "multiplied by FP8 matrix units"
FP4_UNITS = "multiplied by FP4 matrix units"
NO_FP8_UNITS = (
    "no FP8 matrix units before 8.9: the weights are widened in the kernel and inputs stay 16-bit"
)
NO_FP4_UNITS = (
    "no FP4 matrix units before 10.0: the weights are widened in the kernel and inputs stay 16-bit"
)
NO_PACKED_READER = (
    "transformers has no reader of modelopt checkpoints: packed weights do not fit their layers"
)
UNKNOWN_TO_VLLM = (
    "vLLM knows no {} in modelopt checkpoints: it refuses one of that alone, and stops at the "
    "layer's scales in a mixed one"
)
UNKNOWN_TO_SGLANG = (
    "SGLang knows no {} in modelopt checkpoints and would build the layer unquantised without an "
    "error"
)
EMULATION = "unpacked to the model's dtype, inputs rounded as the format says"

Row: TypeAlias = tuple[tuple[int | None, ...], Verdict, str]
"""Compute capabilities, how the format runs there, and why."""


def records(
    engine: tuple[str, str],
    container: Container,
    fmt: FormatName,
    *rows: Row,
    out_features_multiple: int = 1,
    runs_experts: bool = True,
    counts_fused_rows: bool = False,
    alone: tuple[Verdict, str] | None = None,
    mixed: tuple[Verdict, str] | None = None,
) -> Iterator[Support]:
    """One record for each row.

    Args:
        engine: name and source.
        out_features_multiple: see `Support`; of those rows that run.
        runs_experts: see `Support`; of those rows that run.
        counts_fused_rows: see `Support`.
        alone: see `Support`; of those rows that do not run.
        mixed: see `Support`; of those rows that do not run.
    """
    for capabilities, verdict, reason in rows:
        yield Support(
            engine=engine[0],
            container=container,
            format=fmt,
            capabilities=capabilities,
            verdict=verdict,
            reason=reason,
            source=engine[1],
            out_features_multiple=out_features_multiple if verdict.runs else 1,
            runs_experts=runs_experts or not verdict.runs,
            counts_fused_rows=counts_fused_rows,
            alone=None if verdict.runs else alone,
            mixed=None if verdict.runs else mixed,
        )


def everywhere(fmt: FormatName) -> Iterator[Support]:
    """Where nothing runs, in no format and from no container."""
    unknown = "which formats {} runs on CPUs was not looked into; transformers:cpu runs them"
    places = (
        ((VLLM[0], "not checked"), CPU, unknown.format("vLLM")),
        ((SGLANG[0], "not checked"), CPU, unknown.format("SGLang")),
        (SGLANG, TURING, "SGLang asks for 8.0 or newer for these checkpoints"),
        (TENSORRT, CPU, "TensorRT-LLM runs on NVIDIA GPUs only"),
        (TENSORRT, TURING, "TensorRT-LLM runs on 8.0 and newer"),
    )
    for container, (engine, capabilities, reason) in product(Container, places):
        yield from records(engine, container, fmt, (capabilities, NO, reason))


def emulated(fmt: FormatName, modelopt: str = NO_PACKED_READER) -> Iterator[Support]:
    """What transformers does: it runs every format of compressed-tensors, and none of modelopt."""
    yield from records(TRANSFORMERS, MODELOPT, fmt, (CPU + GPUS, NO, modelopt))
    yield from records(TRANSFORMERS, COMPRESSED, fmt, (CPU + GPUS, EMULATED, EMULATION))
