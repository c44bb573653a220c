"""How scales and codes are found: the formats' own algorithms, and what a user puts together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias


def _plain(number: float) -> str:
    """A number as a user would write it, none of its digits lost."""
    return repr(number).removesuffix(".0")


class InputScaling(StrEnum):
    """How the scales of input channels are searched."""

    NONE = "none"
    AWQ = "awq"
    """Evens out mean magnitudes (Lin et al., "AWQ", 2023)."""
    SMOOTH = "smooth"
    """Moves outliers into the weight (Xiao et al., "SmoothQuant", 2022)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackOptions:
    """How errors are fed back (Frantar et al., "GPTQ", 2022)."""

    damping: float = 0.01
    """Share of the mean input power that is added to every channel's, as in the paper."""
    by_power: bool = True
    """Whether columns are rounded in the order of falling input power ("act-order"), or as they lie.
    Scales are chosen before, under the groups as they lie, so that no order has to be stored."""

    def __str__(self) -> str:
        default = FeedbackOptions()
        options = []
        if self.damping != default.damping:
            options.append(f"damping={_plain(self.damping)}")
        if self.by_power != default.by_power:
            options.append("order=given")
        return "gptq" + (f":{','.join(options)}" if options else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSteps:
    """What is done to calibrate a layer in one format."""

    input_scaling: InputScaling = InputScaling.NONE
    smooth_strength: float | None = None  # of SmoothQuant, in [0, 1]; None: searched
    weighs_errors: bool = False
    """Whether block scales are chosen by the error that they leave: each by itself and by its channels'
    mean squares before errors are fed back, else one after the other by the error of the outputs."""
    feedback: FeedbackOptions | None = None  # None: every weight takes the nearest code
    input_percentile: float | None = None  # of magnitudes, that input scales reach; None: all

    @property
    def searches_input_scales(self) -> bool:
        """Whether inputs are scaled per channel."""
        return self.input_scaling is not InputScaling.NONE

    @property
    def weighs_outputs(self) -> bool:
        """Whether block scales are chosen by the error of the outputs."""
        return self.weighs_errors and self.feedback is None

    @property
    def needs_second_moments(self) -> bool:
        """Whether correlations between a layer's input channels are looked at."""
        return self.weighs_outputs or self.feedback is not None

    @property
    def feeds_errors_back(self) -> bool:
        """Whether codes are other than the nearest ones, and have to be stored."""
        return self.feedback is not None


class CalibrationAlgorithm(StrEnum):
    """How a format's scales are found."""

    NONE = "none"
    """There are none."""
    MAX = "max"
    """From largest magnitudes."""
    SMOOTH = "smooth"
    """From largest magnitudes, after input scales that move outliers into the weight, as strong as
    the output error wants them per layer (Xiao et al., "SmoothQuant", 2022)."""
    AWQ_LITE = "awq_lite"
    """From largest magnitudes, after input scales that are searched per layer by the output error
    (Lin et al., "AWQ", 2023)."""
    AWQ_MSE = "awq_mse"
    """Input scales as AWQ_LITE; the weight's block scales are those that leave the least squared
    error, weighted by the mean square of the input channel (AWQ's search for clipping, upwards as
    well as downwards)."""
    AWQ_GPTQ = "awq_gptq"
    """Scales as AWQ_MSE; then weights are rounded column by column, and what a column's rounding
    does to the outputs is made up for by the columns that follow (Frantar et al., "GPTQ", 2022)."""

    @property
    def steps(self) -> CalibrationSteps:
        """The same, step by step."""
        return _STEPS[self]


_STEPS: Mapping[CalibrationAlgorithm, CalibrationSteps] = MappingProxyType(
    {
        CalibrationAlgorithm.NONE: CalibrationSteps(),
        CalibrationAlgorithm.MAX: CalibrationSteps(),
        CalibrationAlgorithm.SMOOTH: CalibrationSteps(input_scaling=InputScaling.SMOOTH),
        CalibrationAlgorithm.AWQ_LITE: CalibrationSteps(input_scaling=InputScaling.AWQ),
        CalibrationAlgorithm.AWQ_MSE: CalibrationSteps(
            input_scaling=InputScaling.AWQ, weighs_errors=True
        ),
        CalibrationAlgorithm.AWQ_GPTQ: CalibrationSteps(
            input_scaling=InputScaling.AWQ, weighs_errors=True, feedback=FeedbackOptions()
        ),
    }
)


class CalibrationMethod(StrEnum):
    """Which of a format's own algorithms calibrates it."""

    BEST = "best"
    """`QuantFormat.calibration`: what gives the smallest loss."""
    SCALES = "scales"
    """As BEST, but every weight takes the nearest code, and block scales are chosen by the error of the
    outputs: no codes are stored."""
    MAX = "max"
    """`QuantFormat.plain_calibration`: scales from largest magnitudes, which other tools have, too;
    to compare allocations under one and the same quantiser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecipe:
    """Algorithms that were put together by name; each format takes those that it can.

    Of `awq` and `smoothquant` together, formats of 4 bits take the former, others the latter.
    """

    percentile: float | None = None
    awq: bool = False
    smoothquant: bool = False
    smooth_strength: float | None = None
    mse: bool = False
    gptq: FeedbackOptions | None = None

    def __str__(self) -> str:
        """The name that parses to the same recipe; equal recipes have equal names."""
        return "+".join(self._names()) or "rtn"

    def _names(self) -> Iterator[str]:
        if self.percentile is not None:
            yield f"percentile:{_plain(self.percentile)}"
        if self.awq:
            yield "awq" if self.mse else "awq_lite"
        if self.smoothquant:
            strength = self.smooth_strength
            yield "smoothquant" if strength is None else f"smoothquant:{_plain(strength)}"
        if self.mse and not self.awq:
            yield "mse"
        if self.gptq is not None:
            yield str(self.gptq)

    def steps(self, best: CalibrationSteps, *, calibrates_inputs: bool) -> CalibrationSteps:
        """Those of the recipe that a format can take.

        Args:
            best: what the format is calibrated by at its best; it can take no others.
            calibrates_inputs: whether its inputs have a calibrated scale.
        """
        scaling = InputScaling.NONE
        if best.searches_input_scales:
            scaling = self._input_scaling(four_bits=best.weighs_errors)
        smooth = scaling is InputScaling.SMOOTH
        return CalibrationSteps(
            input_scaling=scaling,
            smooth_strength=self.smooth_strength if smooth else None,
            weighs_errors=self.mse and best.weighs_errors,
            feedback=self.gptq if best.feeds_errors_back else None,
            input_percentile=self.percentile if calibrates_inputs else None,
        )

    def _input_scaling(self, *, four_bits: bool) -> InputScaling:
        if self.awq and (four_bits or not self.smoothquant):
            return InputScaling.AWQ
        return InputScaling.SMOOTH if self.smoothquant else InputScaling.NONE

    def idle(self, taken: Iterable[CalibrationSteps]) -> list[str]:
        """Names of the recipe that none of the formats takes, given what each does take."""
        steps = list(taken)
        used = {
            "percentile": any(step.input_percentile is not None for step in steps),
            "awq": any(step.input_scaling is InputScaling.AWQ for step in steps),
            "smoothquant": any(step.input_scaling is InputScaling.SMOOTH for step in steps),
            "mse": any(step.weighs_errors for step in steps),
            "gptq": any(step.feeds_errors_back for step in steps),
        }
        named = {
            "percentile": self.percentile is not None,
            "awq": self.awq,
            "smoothquant": self.smoothquant,
            "mse": self.mse and not self.awq,
            "gptq": self.gptq is not None,
        }
        return [name for name in named if named[name] and not used[name]]


Calibration: TypeAlias = CalibrationMethod | CalibrationRecipe
"""How a search calibrates."""
