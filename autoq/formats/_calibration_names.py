"""Names of calibration algorithms, alone and joined, read and refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from autoq.errors import InputError
from autoq.formats._calibration import (
    Calibration,
    CalibrationMethod,
    CalibrationRecipe,
    FeedbackOptions,
)

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "rtn": "scales from largest magnitudes and nearest codes for every format, without input "
        "scales",
        "percentile:P": "input scales reach P per cent of the magnitudes; what is above is clipped",
        "mse": "block scales by the squared error of the outputs that they leave",
        "awq_lite": "input channels scaled, by the error of the outputs",
        "awq": "awq_lite and mse",
        "smoothquant[:ALPHA]": "outliers of inputs moved into the weight, as strongly as the error "
        "of the outputs wants it, or by ALPHA in [0, 1]",
        "gptq[:damping=D,order=power|given]": "4-bit codes that make up for each other's errors",
    }
)
"""Name -> what it does; of those that can be put together with a plus sign."""


def parse_calibration(text: str) -> Calibration:
    """The way to calibrate that is called so: "best", "awq+gptq", "percentile:99.9+mse" and so on.

    Raises:
        InputError: a name is unknown, names contradict each other, or an option is out of range.
    """
    if text in tuple(CalibrationMethod):
        return CalibrationMethod(text)
    found: dict[str, Any] = {}
    names = text.split("+")
    for name in names:
        for field_name, value in _parsed(name, text).items():
            if found.setdefault(field_name, value) != value:
                raise InputError(
                    f"calibration {text!r} names {name.partition(':')[0]} twice; name it once"
                )
    _refuse_contradictions(names, text)
    return CalibrationRecipe(**found)


def known_calibrations() -> str:
    """What `parse_calibration` takes, in one line."""
    methods = ", ".join(method.value for method in CalibrationMethod)
    return f"{methods}, or {', '.join(ALGORITHMS)} joined by '+'"


def _refuse_contradictions(names: list[str], text: str) -> None:
    plain = {"rtn", "max"} & set(names)
    searched = [name for name in names if name.partition(":")[0] in ("mse", "awq")]
    if plain and searched:
        raise InputError(
            f"calibration {text!r} contradicts itself: {min(plain)} takes largest magnitudes and "
            f"{searched[0]} searches block scales; leave one out"
        )
    if "rtn" in names and any(
        not name.startswith("percentile:") for name in names if name != "rtn"
    ):
        raise InputError(
            f"calibration {text!r} contradicts itself: rtn takes nearest codes and no input scales; "
            "join it with nothing but percentile:P"
        )


def _parsed(name: str, text: str) -> dict[str, Any]:
    head, colon, option = name.partition(":")
    if head in (CalibrationMethod.BEST, CalibrationMethod.SCALES):
        raise InputError(
            f"calibration {text!r} joins {head} with others, and it stands alone; "
            f"known: {known_calibrations()}"
        )
    if head not in _PARSERS or (colon and head not in _WITH_OPTION):
        raise InputError(f"no calibration named {name!r}; known: {known_calibrations()}")
    if not colon and head == "percentile":
        raise InputError("percentile needs a number, as in percentile:99.9")
    return _PARSERS[head](option)


def _parse_percentile(option: str) -> dict[str, Any]:
    return {"percentile": _number(option, "percentile", above=50.0, up_to=100.0)}


def _parse_smoothquant(option: str) -> dict[str, Any]:
    strength = _number(option, "smoothquant's alpha", least=0.0, up_to=1.0) if option else None
    return {"smoothquant": True, "smooth_strength": strength}


def _parse_gptq(option: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for entry in filter(None, option.split(",")):
        key, _, value = entry.partition("=")
        if key == "damping":
            options["damping"] = _number(value, "gptq's damping", above=0.0, up_to=1.0)
        elif key == "order" and value in ("power", "given"):
            options["by_power"] = value == "power"
        else:
            raise InputError(
                f"gptq takes damping=D and order=power or order=given, got {entry!r}; "
                "write for example gptq:damping=0.05,order=given"
            )
    return {"gptq": FeedbackOptions(**options)}


_PARSERS: Mapping[str, Callable[[str], dict[str, Any]]] = MappingProxyType(
    {
        "rtn": lambda _: {},
        "max": lambda _: {},
        "percentile": _parse_percentile,
        "mse": lambda _: {"mse": True},
        "awq_lite": lambda _: {"awq": True},
        "awq": lambda _: {"awq": True, "mse": True},
        "smoothquant": _parse_smoothquant,
        "gptq": _parse_gptq,
    }
)
_WITH_OPTION = frozenset({"percentile", "smoothquant", "gptq"})


def _number(
    text: str, what: str, *, above: float = -math.inf, least: float = -math.inf, up_to: float
) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > above and value >= least and value <= up_to):
        bounds = f"({above:g}" if above > -math.inf else f"[{least:g}"
        raise InputError(f"{what} must be a number in {bounds}, {up_to:g}], got {text!r}")
    return value
