"""What a search is asked to do, as one frozen value that survives a round trip through JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from autoq.errors import InputError
from autoq.formats import (
    FORMATS,
    NONE,
    Calibration,
    CalibrationMethod,
    CalibrationRecipe,
    Container,
    FormatName,
    parse_calibration,
    portable_formats,
)
from autoq.search.estimator_names import DEFAULT_ESTIMATOR, ESTIMATOR_NAMES

__all__ = [
    "DTYPES",
    "ScoringConfig",
    "parse_calibration",
    "parse_container",
    "refuse_idle_calibration",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """Everything that calibration and scores depend on; a change makes another study.

    Budgets and rules are not part of it: every plan is solved from the same scores.
    """

    formats: tuple[FormatName, ...] = portable_formats()
    include: tuple[str, ...] = ()  # globs of layers to search though excluded by default
    exclude: tuple[str, ...] = ()  # globs of layers to leave alone
    calibration_data: str | None = None  # None: the bundled text
    calibration_sequences: int = 128
    sequence_length: int = 512  # tokens
    batch_size: int = 4  # sequences
    container: Container = Container.MODELOPT
    calibration: Calibration = CalibrationMethod.BEST
    dtype: str = "auto"  # of the model while it is searched
    device: str = "auto"
    row_fraction: float = 1.0  # share of the tokens whose projections are computed
    estimator: str = DEFAULT_ESTIMATOR
    draws: int | None = None  # of labels for every sequence; None: as the estimator likes
    confidence: float | None = None  # that ends the scoring pass, in (0, 1); None: all sequences
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.formats or set(self.formats) == {NONE}:
            raise InputError(
                "formats must name at least one quantised format, got "
                f"{', '.join(self.formats) or 'none'}; known: {', '.join(sorted(FORMATS))}"
            )
        for name in self.formats:
            FORMATS[name]
        refuse_idle_calibration(self.calibration, self.formats)
        for field_name in ("calibration_sequences", "sequence_length", "batch_size"):
            if getattr(self, field_name) < 1:
                raise InputError(f"{field_name} must be >= 1, got {getattr(self, field_name)}")
        if self.sequence_length < 2:
            raise InputError("sequence_length must be >= 2, got 1; a loss needs a next token")
        if not 0.0 < self.row_fraction <= 1.0:
            raise InputError(f"row_fraction must be in (0, 1], got {self.row_fraction}")
        _check_estimator(self.estimator)
        if self.draws is not None and self.draws < 1:
            raise InputError(f"draws must be >= 1, got {self.draws}")
        if self.confidence is not None and not 0.0 < self.confidence < 1.0:
            raise InputError(f"confidence must be in (0, 1), got {self.confidence:g}; try 0.95")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "calibration": str(self.calibration)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoringConfig:
        """The value that `to_json` came from; unknown keys are refused.

        Configurations of before there was a choice of calibration mean plain calibration.

        Raises:
            InputError: a key is unknown.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise InputError(f"unknown configuration keys: {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        values["container"] = parse_container(values.get("container", Container.MODELOPT))
        values["calibration"] = parse_calibration(values.get("calibration", CalibrationMethod.MAX))
        return cls(**values)


def parse_container(name: str) -> Container:
    """The container called `name`.

    Raises:
        InputError: nothing has that name.
    """
    try:
        return Container(name)
    except ValueError:
        known = ", ".join(container.value for container in Container)
        raise InputError(
            f"no container named {name!r}; known: {known}; `autoq export` alone also writes onnx, "
            "tensorrt-llm and transformers-fp8, of studies searched for one of these"
        ) from None


def _check_estimator(name: str) -> None:
    """
    Raises:
        UnknownNameError: nothing has that name.
    """
    if name not in ESTIMATOR_NAMES:
        from autoq.search.estimators import ESTIMATORS  # needs torch

        ESTIMATORS[name]


def refuse_idle_calibration(calibration: Calibration, formats: Sequence[FormatName]) -> None:
    """
    Raises:
        InputError: an algorithm was asked for by name that none of the formats can take.
    """
    if not isinstance(calibration, CalibrationRecipe):
        return
    taken = [FORMATS[name].algorithm(calibration) for name in formats]
    for name in calibration.idle(taken):
        raise InputError(
            f"calibration {calibration} names {name}, which none of the formats "
            f"{', '.join(formats)} can take; leave it out or offer a format that is "
            "calibrated by it (`autoq formats`)"
        )
