"""What GPUs can do at most, from their vendors' public datasheets.

Where `source` says "second hand", several public tables that name that document agree on the
figures, and the document itself was not compared; so it is with all figures of INT8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autoq.formats import ActivationScheme, QuantFormat
from autoq.registry import Registry


class MatrixUnit(StrEnum):
    """What a GPU's matrix units multiply; sums are in float32, those of INT8 in int32."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU's peaks, for dense matrices: figures with structured sparsity are halved."""

    name: str
    description: str
    bytes_per_second: float  # of its memory
    operations_per_second: Mapping[MatrixUnit, float]  # a multiplication and an addition are two
    source: str

    def unit_for(self, fmt: QuantFormat) -> MatrixUnit:
        """What multiplies weights of the format with their inputs.

        Where the GPU has no unit for the format's inputs, engines keep the format for the weights
        alone: they are decoded on the way, and inputs stay in 16 bits. So NVFP4 runs on Hopper
        and before it, and FP8 on Ampere.
        """
        unit = _UNITS.get(fmt.activation, MatrixUnit.BF16)
        return unit if unit in self.operations_per_second else MatrixUnit.BF16


_UNITS = {
    ActivationScheme.FP8_STATIC_TENSOR: MatrixUnit.FP8,
    ActivationScheme.FP8_DYNAMIC_TOKEN: MatrixUnit.FP8,
    ActivationScheme.FP8_DYNAMIC_BLOCK: MatrixUnit.FP8,
    ActivationScheme.INT8_DYNAMIC_TOKEN: MatrixUnit.INT8,
    ActivationScheme.NVFP4_DYNAMIC: MatrixUnit.NVFP4,
    ActivationScheme.MXFP8_UP: MatrixUnit.MXFP8,
    ActivationScheme.MXFP4_HALF: MatrixUnit.MXFP4,
}

GPUS: Registry[Gpu] = Registry("GPU")
"""The GPUs whose latency is predicted without measurements."""


def _register(
    name: str, description: str, gigabytes: float, source: str, **teraflops: float
) -> None:
    rates = {MatrixUnit(unit): rate * 1e12 for unit, rate in teraflops.items()}
    GPUS.register(
        name,
        Gpu(
            name=name,
            description=description,
            bytes_per_second=gigabytes * 1e9,
            operations_per_second=rates,
            source=source,
        ),
    )


_register(
    "a100",
    "NVIDIA A100 80GB SXM",
    2039,
    "NVIDIA A100 Tensor Core GPU datasheet",
    bf16=312,
    int8=624,
)
_register(
    "l4",
    "NVIDIA L4",
    300,
    "NVIDIA L4 Tensor Core GPU datasheet, where rates are with sparsity",
    bf16=121,
    fp8=242.5,
    int8=242.5,
)
_register(
    "l40s",
    "NVIDIA L40S",
    864,
    "NVIDIA L40S datasheet",
    bf16=362.05,
    fp8=733,
    int8=733,
)
_register(
    "rtx4090",
    "NVIDIA GeForce RTX 4090",
    1008,
    "second hand: NVIDIA Ada GPU Architecture whitepaper, appendix A; sums in float32",
    bf16=165.2,
    fp8=330.3,
    int8=660.6,
)
_register(
    "h100",
    "NVIDIA H100 SXM",
    3350,
    "NVIDIA H100 Tensor Core GPU datasheet, where rates are with sparsity",
    bf16=989.5,
    fp8=1979,
    int8=1979,
)
_register(
    "h200",
    "NVIDIA H200 SXM",
    4800,
    "NVIDIA H200 Tensor Core GPU datasheet, where rates are with sparsity",
    bf16=989.5,
    fp8=1979,
    int8=1979,
)
_register(
    "b200",
    "NVIDIA B200 SXM",
    8000,
    "NVIDIA Blackwell Architecture Technical Brief, HGX B200",
    bf16=2250,
    fp8=4500,
    nvfp4=9000,
    mxfp8=4500,  # the datasheets give one figure for FP8 and one for FP4, whatever scales them
    mxfp4=9000,
    int8=4500,
)
_register(
    "rtx5090",
    "NVIDIA GeForce RTX 5090",
    1792,
    "second hand: NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A; sums in float32",
    bf16=209.5,
    fp8=419,
    nvfp4=1676,
    mxfp8=419,
    mxfp4=1676,
    int8=838,
)
_register(
    "mi300x",
    "AMD Instinct MI300X",
    5300,
    "second hand: AMD Instinct MI300X Accelerator data sheet",
    bf16=1307.4,
    fp8=2614.9,
    int8=2614.9,
)
