"""How long a search will take: its multiplications, by the rate at which this machine multiplies.

The rate is measured for a moment, with the shapes of the model's own products; what else runs on the
machine makes a search longer. What is not a matrix product is counted in multiples of products; how
good that is, `benchmarks/preflight.py` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autoq.api._preflight_memory import Workload
from autoq.calibration.moments import ROWS_PER_CHANNEL
from autoq.search._projections import projection_dtype
from autoq.search._token_sampling import SMALLEST_PROBABILITY

_MEASURING_SECONDS = 0.15
"""For each rate. A search takes a hundred times as long, and one product is not a rate."""

_LARGEST_SIDE = 4096
"""Of the matrices that are multiplied to measure: larger ones are as fast, and take longer."""

_BESIDE_PRODUCTS = 1.5
"""Time of a block beside that of its products: norms, attention, activation functions."""

_SAMPLED_TOKENS = 2 * SMALLEST_PROBABILITY
"""Share of the tokens that formats are projected on; see `autoq.search._token_sampling`."""

_ROUNDING_PASSES = {"nearest": 4, "searched": 60, "scaled": 600}
"""Passes over a matrix's values to round it: once; with block scales chosen among a score of
candidates; and with an input scale searched on top of that."""


_FACTOR_BESIDE_PRODUCT = 3
"""Time of a multiplication in a factor, in float64, beside one in a product of float32: half the
rate, and less of it than products reach."""

_STEP_SECONDS = 0.01
"""For a matrix in a format, whatever its size: a few hundred calls, a row, a file's entry."""

_READS = 3
"""A file's bytes are read for its hash, read for their values, and cast or written."""

_BYTES_PER_SECOND = 4e8
"""Of a disk that is neither the fastest nor the slowest; nothing is measured."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does in a second."""

    multiplications: float  # of float32 matrices, multiply-adds
    projections: float  # the same in the dtype of projections
    values: float  # of float32 that are multiplied, rounded and written


def measured_rates(work: Workload, device: torch.device) -> Rates:
    """Rates of products as wide as the model's, and of passes over values."""
    slot = max(work.slots, key=lambda entry: entry.weights)
    rows = min(work.batch_tokens, _LARGEST_SIDE)
    sides = [min(size, _LARGEST_SIDE) for size in (slot.in_features, slot.out_features)]
    lower = projection_dtype(work.model, device)
    return Rates(
        multiplications=_product_rate(rows, sides[0], sides[1], work.dtype, device),
        projections=_product_rate(rows, sides[0], sides[1], lower, device),
        values=_value_rate(device),
    )


def _product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> float:
    one = torch.ones(rows, inner, dtype=dtype, device=device)
    other = torch.ones(columns, inner, dtype=dtype, device=device)
    return rows * inner * columns / _seconds_of(lambda: one @ other.t(), device)


def _value_rate(device: torch.device) -> float:
    values = torch.ones(1 << 20, device=device)
    return values.numel() / _seconds_of(lambda: (values * 0.3).round_(), device)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of one call, as if nothing else ran; the first warms caches."""
    work()
    times: list[float] = []
    end = time.perf_counter() + _MEASURING_SECONDS
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def seconds_by_stage(work: Workload, rates: Rates) -> dict[str, float]:
    """What each stage of a search takes."""
    forward = _multiplications_of_a_token(work) * _BESIDE_PRODUCTS / rates.multiplications
    tokens = work.config.calibration_sequences * work.tokens_in_sequence
    stages = {
        "loading": work.stored_bytes * _READS / _BYTES_PER_SECOND,
        "calibrating": _calibrating(work, rates, forward, tokens),
        "scoring": _scoring(work, rates, forward, tokens),
    }
    if work.held_out_sequences:
        held_out = work.held_out_sequences * work.tokens_in_sequence
        # The original, the noise floor, and the plan.
        stages["measuring"] = 3 * forward * held_out + _rounding(work, rates, "nearest")
    if work.exports:
        moved = _READS * work.checkpoint_bytes / _BYTES_PER_SECOND
        rounded = 2 * _rounding(work, rates, "nearest")  # written, and read back
        stages["exporting"] = moved + rounded + _STEP_SECONDS * len(work.model_map.slots)
    return stages


def _multiplications_of_a_token(work: Workload) -> float:
    searched = sum(slot.weights * work.share_of_tokens(slot) for slot in work.slots)
    return searched + work.hidden_width * work.output_width


def _calibrating(work: Workload, rates: Rates, forward: float, tokens: int) -> float:
    rows = [min(tokens, ROWS_PER_CHANNEL * width) for width in work.input_widths]
    moments = sum(w * w * n for w, n in zip(work.input_widths, rows, strict=True))
    seconds = forward * tokens + moments / rates.multiplications
    seconds += _STEP_SECONDS * len(work.formats) * len(work.model_map.slots)
    for fmt in work.formats:
        steps = fmt.algorithm(work.config.calibration)
        if steps.searches_input_scales:
            seconds += _rounding(work, rates, "scaled")
        elif steps.weighs_errors:
            seconds += _rounding(work, rates, "searched")
        else:
            seconds += _rounding(work, rates, "nearest")
        if steps.feeds_errors_back:
            # Each column's error is spread over those behind it, and what comes out is compared
            # with the nearest codes by two products with the moment. Before that, the factor of
            # the moment's inverse: two Cholesky factors and an inverse.
            squares = sum(slot.weights * slot.in_features for slot in work.slots)
            factors = sum(2 * width**3 / 3 for width in work.input_widths)
            products = 0.5 * squares + 2 * squares + _FACTOR_BESIDE_PRODUCT * factors
            seconds += products / rates.multiplications
    return seconds


def _scoring(work: Workload, rates: Rates, forward: float, tokens: int) -> float:
    # Backward asks for inputs' gradients only, and blocks are computed once more for it.
    seconds = 3 * forward * tokens
    projected = sum(slot.weights * work.share_of_tokens(slot) for slot in work.slots)
    formats = len(work.formats)
    seconds += formats * projected * tokens * _SAMPLED_TOKENS / rates.projections
    return seconds + formats * _rounding(work, rates, "nearest")


def _rounding(work: Workload, rates: Rates, kind: str) -> float:
    return _ROUNDING_PASSES[kind] * work.searched_weights / rates.values
