"""Numbers as people read them: the same on the terminal and in the report."""

from __future__ import annotations

import math
from typing import Any

MISSING = "-"
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", " K", " M", " G", " T")


def finite(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if value is None or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def bits_text(value: Any) -> str:
    """Bits per weight, four decimals: 4.8000."""
    number = finite(value)
    return MISSING if number is None else f"{number:.4f}"


def loss_text(value: Any) -> str:
    """A loss, four significant digits or more: 0.01234, 1.234e-05, 2348.7."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0.0:
        return "0"
    if 1e3 <= abs(number) < 1e6:
        return f"{number:.1f}"
    return f"{number:#.4g}" if 1e-3 <= abs(number) < 1e3 else f"{number:.3e}"


def interval_text(low: Any, high: Any) -> str:
    """An interval: 0.01 to 0.02; a side without a bound says so."""
    below = loss_text(low) if finite(low) is not None else "no lower bound"
    above = loss_text(high) if finite(high) is not None else "no upper bound"
    return f"{below} to {above}"


def percent_text(value: Any) -> str:
    """A share, two decimals: 99.21 %; what they cannot show is less than they can."""
    number = finite(value)
    if number is None:
        return MISSING
    if 0.0 < number < 5e-5:
        return "< 0.01 %"
    return f"{number * 100:.2f} %"


def bytes_text(value: Any) -> str:
    """A size: 3.21 MiB."""
    number = finite(value)
    if number is None:
        return MISSING
    unit = 0
    while abs(number) >= 1024 and unit < len(_BYTE_UNITS) - 1:
        number /= 1024
        unit += 1
    return f"{number:.0f} B" if unit == 0 else f"{number:.2f} {_BYTE_UNITS[unit]}"


def count_text(value: Any) -> str:
    """How many: 12.3 M; below ten thousand in full."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 10_000:
        return f"{number:.0f}"
    unit = 0
    while abs(number) >= 1000 and unit < len(_COUNT_UNITS) - 1:
        number /= 1000
        unit += 1
    return f"{number:.3g}{_COUNT_UNITS[unit]}"


def seconds_text(value: Any) -> str:
    """A duration: 0.42 s, 3 min 05 s, 2 h 05 min."""
    number = finite(value)
    if number is None:
        return MISSING
    if number < 60:
        return f"{number:.2f} s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


UNIT_TEXT = {"nats_per_token": "nats per token", "relative": "relative units"}


def unit_text(unit: str) -> str:
    """The unit of a loss, in words."""
    return UNIT_TEXT.get(unit, unit)


METRIC_TEXT = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the original",
    "word_perplexity": "perplexity per word",
    "reference_word_perplexity": "perplexity per word of the original",
    "byte_perplexity": "perplexity per byte",
    "reference_byte_perplexity": "perplexity per byte of the original",
    "kl_median": "KL divergence, median of tokens",
    "kl_p90": "KL divergence, 90th percentile of tokens",
    "kl_p99": "KL divergence, 99th percentile of tokens",
    "kl_unsure": "KL divergence where the original is unsure (below 50 %)",
    "kl_likely": "KL divergence where the original is 50 to 90 % sure",
    "kl_sure": "KL divergence where the original is at least 90 % sure",
    "generation_agreement": "equal tokens in greedy continuations",
    "first_divergence": "tokens before greedy continuations part",
    "cosine_similarity": "cosine of outputs",
    "seconds_per_step": "seconds per step",
    "step_time_ratio": "seconds per step, of the original's",
    "weight_bytes": "bytes of weights in memory",
    "weight_bytes_ratio": "bytes of weights in memory, of the original's",
}


def metric_text(name: str) -> str:
    """A metric's name, in words."""
    return METRIC_TEXT.get(name, name.replace("_", " "))


def metric_value_text(name: str, value: Any) -> str:
    """A metric's value in its own style: shares as per cent, the rest as a loss."""
    if name.endswith(("agreement", "accuracy")):
        return percent_text(value)
    return loss_text(value)
