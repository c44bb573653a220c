"""What clients ask to be done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from autoq.wire._base import Name, Names, Path, Positive, Request, Rules

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class _Limits(Request):
    """Budgets; all that are given hold at once."""

    effective_bits: Positive | None = None
    max_gb: Positive | None = None
    max_active_bits: Positive | None = None
    max_latency_ms: Positive | None = None
    gpu: Name | None = None


class SearchRequest(_Limits):
    """`autoq search`; the fields are the arguments of `autoq.search`."""

    model: Path
    max_kl: Positive | None = None
    latency_tokens: Count = 1
    formats: Names | None = None
    rules: Rules = ()
    include: Names = ()
    exclude: Names = ()
    kv_formats: Names | None = None
    kv_bits: Positive | None = None
    kv_scope: Literal["model", "layer"] | None = None
    calibration_data: Path | None = None
    calibration_sequences: Count = 128
    sequence_length: Count = 512
    batch_size: Count = 4
    held_out_sequences: Count = 32
    container: Name | None = None
    target: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    max_memory: (
        Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*([KMGT]i?B|B)?$", max_length=32)] | None
    ) = None
    calibration: Name = "best"
    estimator: Name | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    measure: bool = True
    compare_uniform: bool = False
    refine: Annotated[int, Field(ge=0, le=100_000)] = 0
    export: Path | None = None
    overwrite: bool = False


class RefineRequest(_Limits):
    """`autoq refine`: measure so many plans round the one for the budgets, or the last one."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    objective: Annotated[str, Field(max_length=500)] | None = None


class MeasureRequest(Request):
    """`autoq eval`: measure a stored plan on held-out data."""

    plan: int


class ExportRequest(_Limits):
    """`autoq export`: a stored plan, or the one for budgets, or the study's last one."""

    output: Path
    plan: int | None = None
    container: Name | None = None
    tp_size: Annotated[int, Field(ge=1, le=1024)] = 1
    pp_size: Annotated[int, Field(ge=1, le=1024)] = 1
    overwrite: bool = False


class VerifyRequest(Request):
    """`autoq verify`."""

    checkpoint: Path
    target: Name | None = None
