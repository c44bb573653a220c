"""Colours: one per format, and a ramp for losses, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from autoq.formats import NONE

_FORMAT_COLOURS: Mapping[str, str] = {
    NONE: "#9aa3ad",
    "fp8": "#3b82c4",
    "nvfp4": "#e08a2c",
    "w4a8_awq": "#4a9d5b",
    "fp8_pc_pt": "#1f4f87",
    "fp8_block": "#7db3e8",
    "mxfp8": "#2aa3a3",
    "mxfp4": "#c94f6d",
    "int4_awq": "#7f9c2e",
    "int4_dq": "#b9c94a",
    "int8_sq": "#5b6fd6",
    "int8_wo": "#a15fb3",
    "nvfp4_wo": "#8a6d3b",
    "nvfp4_svdquant": "#b3541e",
}
_FURTHER_COLOURS = ("#b58db6", "#6b7a55", "#c2b04a", "#4f7f86", "#d48fa0", "#3f3f7a")

# Light to dark, roughly even steps of lightness.
_RAMP = (
    (253, 231, 176),
    (247, 187, 118),
    (236, 132, 90),
    (207, 76, 87),
    (151, 36, 98),
    (80, 18, 82),
)


def format_colours(formats: Sequence[str]) -> dict[str, str]:
    """A colour for each format; the built-in ones always have the same."""
    further = [name for name in formats if name not in _FORMAT_COLOURS]
    colours = dict(_FORMAT_COLOURS)
    for index, name in enumerate(further):
        colours[name] = _FURTHER_COLOURS[index % len(_FURTHER_COLOURS)]
    return {name: colours[name] for name in formats}


def loss_range(losses: Iterable[float | None]) -> tuple[float, float]:
    """Smallest and largest positive loss; (1, 10) if there is none."""
    positive = [loss for loss in losses if loss is not None and loss > 0.0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    return (low, high) if high > low else (low / 2, high * 2)


def loss_colour(loss: float, low: float, high: float) -> str:
    """Colour of a loss on the logarithmic ramp from `low` to `high`."""
    share = math.log(max(loss, low) / low) / math.log(high / low)
    return ramp_colour(min(max(share, 0.0), 1.0))


def ramp_colour(share: float) -> str:
    """Colour at `share` of the ramp, 0 to 1."""
    place = share * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    fraction = place - index
    channels = (
        round(start + (end - start) * fraction)
        for start, end in zip(_RAMP[index], _RAMP[index + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)
