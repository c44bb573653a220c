"""What a number format is: element types, block shape, scales, bits, and where it loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NewType

from autoq.formats._calibration import (
    Calibration,
    CalibrationAlgorithm,
    CalibrationMethod,
    CalibrationRecipe,
    CalibrationSteps,
)
from autoq.formats._container import Container

FormatName = NewType("FormatName", str)

LOW_RANK_ELEMENT_BITS = 16
"""Width of the numbers in the factors of a low-rank branch."""

SECOND_SCALE_BITS = 32
"""Width of the scale that coded scales are under."""

_SIDE_PER_RANK = 16
"""Rows or columns, whichever are fewer, for each rank of a branch: in small layers its rank is lower,
so that it takes no more than two bits per weight."""

NONE = FormatName("none")
"""The name of the format that leaves a layer as it is."""


class WeightElement(StrEnum):
    """How one weight is coded."""

    E4M3 = "e4m3"
    E2M1 = "e2m1"
    INT4 = "int4"
    INT8 = "int8"


class WeightScaling(StrEnum):
    """Which weights of a matrix [out_features, in_features] share a scale."""

    TENSOR = "tensor"
    """All of them."""
    ROW = "row"
    """Those of one output channel."""
    BLOCK = "block"
    """A square of `weight_block_size` rows and columns, smaller at the edges."""
    GROUP = "group"
    """`weight_block_size` columns of a row."""
    TWO_LEVEL_GROUP = "two_level_group"
    """As GROUP, under one scale for the tensor."""
    DOUBLE_GROUP = "double_group"
    """As GROUP, the scales coded in turn: around their mean, under a scale for
    `scales_per_block` of them."""
    MX = "mx"
    """As GROUP, the scale a power of two in a byte (E8M0)."""


class ActivationScheme(StrEnum):
    """How a layer's input is quantised at run time."""

    NONE = "none"
    FP8_STATIC_TENSOR = "fp8_static_tensor"
    """E4M3 with one calibrated scale for the tensor."""
    FP8_DYNAMIC_TOKEN = "fp8_dynamic_token"
    """E4M3, each token under its own scale."""
    FP8_DYNAMIC_BLOCK = "fp8_dynamic_block"
    """E4M3, each 128 columns of a token under their own scale."""
    MXFP8_UP = "mxfp8_up"
    """E4M3, each 32 columns of a token under a power of two that lets nothing saturate."""
    MXFP8_HALF = "mxfp8_half"
    """As MXFP8_UP, with the next power where the largest magnitude is 1.75 times one or more."""
    MXFP4_HALF = "mxfp4_half"
    """E2M1, scaled as MXFP8_HALF."""
    INT8_DYNAMIC_TOKEN = "int8_dynamic_token"
    """INT8, each token under its own scale."""
    NVFP4_DYNAMIC = "nvfp4_dynamic"
    """E2M1, a dynamic E4M3 scale per 16 values under a calibrated float32 scale."""


_CALIBRATED_ACTIVATIONS = (ActivationScheme.FP8_STATIC_TENSOR, ActivationScheme.NVFP4_DYNAMIC)
"""Whose scale comes from calibration data."""


@dataclass(frozen=True, slots=True)
class StorageBits:
    """What one weight matrix takes in a checkpoint, in bits."""

    weight_bits: int  # the packed codes
    block_scale_bits: int  # scales that grow with the matrix
    tensor_scale_bits: int  # per-tensor scalars, the activation scale among them
    low_rank_bits: int = 0  # both factors of a low-rank branch

    @property
    def effective_bits(self) -> int:
        """Codes, block scales and the low-rank branch: what budgets count."""
        return self.weight_bits + self.block_scale_bits + self.low_rank_bits

    @property
    def stored_bits(self) -> int:
        """Everything that is written for the matrix."""
        return self.effective_bits + self.tensor_scale_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """How one layer's weights and activations are represented.

    Weights are matrices [out_features, in_features]; blocks run along in_features. What the
    numbers are is said by `weight_element`, `weight_scaling` and `activation`.
    """

    name: FormatName
    summary: str
    weight_element: WeightElement | None
    weight_scaling: WeightScaling | None
    weight_bits: int  # bits of one code
    weight_block_size: int | None  # columns that share a scale; None where whole rows do
    block_scale_bits: int  # bits of one scale of a block, a group or a row
    tensor_scale_bits: int  # bits of all per-tensor scalars of one matrix
    activation: ActivationScheme
    calibration: CalibrationAlgorithm
    plain_calibration: CalibrationAlgorithm  # under `CalibrationMethod.MAX`
    peer_bits: float  # what ModelOpt's auto_quantize charges per weight
    portable: bool  # loads in every engine: part of the default set
    loads_in: str  # one sentence: which engines load its export, on which hardware
    when_named: bool = False  # offered to those only who ask for it by name
    stores_input_scale: bool = False  # engines take an input scale that no norm absorbs
    stores_fused_input_scale: bool = True  # and those of layers that they fuse, too
    rows_per_byte: int = 1  # rows whose codes share bytes in some container
    columns_per_word: int = 1  # columns whose codes share words in some container
    scales_per_block: int | None = None  # scales that share a second one, where they are coded
    low_rank: int = 0  # rank of a branch beside the codes, which stand for the rest; 0: none
    container_activations: tuple[tuple[Container, ActivationScheme], ...] = ()
    """Containers whose run time quantises inputs in another way than `activation`."""

    def algorithm(self, calibration: Calibration) -> CalibrationSteps:
        """What is done to calibrate a layer in the format."""
        if isinstance(calibration, CalibrationRecipe):
            calibrates = self.activation in _CALIBRATED_ACTIVATIONS
            return calibration.steps(self.calibration.steps, calibrates_inputs=calibrates)
        if calibration is CalibrationMethod.MAX:
            return self.plain_calibration.steps
        steps = self.calibration.steps
        if calibration is CalibrationMethod.SCALES and steps.feeds_errors_back:
            return replace(steps, feedback=None)
        return steps

    def activation_in(self, container: Container) -> ActivationScheme:
        """How inputs are quantised by the engines that load the container."""
        return dict(self.container_activations).get(container, self.activation)

    def storage_bits(self, out_features: int, in_features: int) -> StorageBits:
        """Bits of one [out_features, in_features] matrix in this format.

        Args:
            out_features: rows of the matrix.
            in_features: columns; such that `refusal` gives None.
        """
        return StorageBits(
            weight_bits=out_features * in_features * self.weight_bits,
            block_scale_bits=self._scale_bits(self._scale_count(out_features, in_features)),
            tensor_scale_bits=self.tensor_scale_bits,
            low_rank_bits=LOW_RANK_ELEMENT_BITS
            * self.branch_rank(out_features, in_features)
            * (out_features + in_features),
        )

    def branch_rank(self, out_features: int, in_features: int) -> int:
        """Rank of the low-rank branch of a matrix of this shape; 0 where the format has none."""
        if not self.low_rank:
            return 0
        return min(self.low_rank, max(1, min(out_features, in_features) // _SIDE_PER_RANK))

    @property
    def nominal_bits(self) -> float:
        """Effective bits per weight of a matrix so large that scales of rows and branches of low
        rank do not count."""
        columns = self.weight_block_size
        if columns is None:
            return float(self.weight_bits)
        rows = columns if self.weight_scaling is WeightScaling.BLOCK else 1
        scale_bits = float(self.block_scale_bits)
        if self.scales_per_block is not None:
            scale_bits += SECOND_SCALE_BITS / self.scales_per_block
        return self.weight_bits + scale_bits / (rows * columns)

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot take the format, or None if it can."""
        block = self.weight_block_size
        if block and in_features % block:
            return f"{self.name} needs in_features divisible by {block}, got {in_features}"
        if out_features % self.rows_per_byte:
            return f"{self.name} packs two rows per byte and needs even out_features, got {out_features}"
        if in_features % self.columns_per_word:
            return (
                f"{self.name} packs {self.columns_per_word} columns per word and needs in_features "
                f"divisible by {self.columns_per_word}, got {in_features}"
            )
        return None

    def _scale_bits(self, count: int) -> int:
        """Bits of so many scales, and of those that these are under."""
        blocks = -(-count // self.scales_per_block) if self.scales_per_block else 0
        return count * self.block_scale_bits + blocks * SECOND_SCALE_BITS

    def _scale_count(self, out_features: int, in_features: int) -> int:
        """Scales of blocks, groups or rows."""
        match self.weight_scaling, self.weight_block_size:
            case None | WeightScaling.TENSOR, _:
                return 0
            case WeightScaling.BLOCK, int(side):
                return -(-out_features // side) * -(-in_features // side)
            case WeightScaling.ROW, _:
                return out_features
            case _, int(columns):
                return out_features * (in_features // columns)
        raise AssertionError(f"{self.name} has no weight_block_size")
