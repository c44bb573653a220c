"""How long a search will take: its multiplications, by the rate at which this machine multiplies.

The rate is measured for a moment, with the shapes of the model's own products; what else runs on the
machine makes a search longer. What is not a matrix product is counted in multiples of products; how
good that is, `benchmarks/preflight.py` says. Work that is divided is dealt batch by batch, or trial by
trial, to processes that are ready sooner or later, as the search deals it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import torch

from autoq.api.preflight.memory import FINALISTS, NEW_SHARE_OF_A_TRIAL
from autoq.api.preflight.teams import ALONE, Team
from autoq.api.preflight.workload import Workload
from autoq.api.refinement.process import fewer_threads
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

_IMPORT_SECONDS = 5.0
"""Python, torch and transformers in a process that begins; nothing is measured."""

_BESIDE_OTHERS = 1.05
"""Time of a batch while other processes of the machine work, too, beside its time alone: they share
caches and the way to memory. Two were 1.91 times as fast as one; see `benchmarks/scaling.py`."""

_CACHE_PASSES = 20
"""Over keys and values to put them into a format, and to project what that changes."""

_TRIAL_SECONDS = 0.05
"""To choose a trial's plan, and to store the trial: a few solutions and transactions."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does in a second."""

    multiplications: float  # of float32 matrices, multiply-adds
    projections: float  # the same in the dtype of projections
    values: float  # of float32 that are multiplied, rounded and written
    are_of_a_gpu: bool = False


def measured_rates(work: Workload, device: torch.device, team: Team) -> Rates:
    """Rates of products as wide as the model's, and of passes over values, of a process in a team.

    Measured with as many threads as it would have. That the others run as well is not measured.
    """
    with fewer_threads(team.threads):
        return _measured(work, device)


def _measured(work: Workload, device: torch.device) -> Rates:
    slot = max(work.slots, key=lambda entry: entry.weights)
    rows = min(work.batch_tokens, _LARGEST_SIDE)
    sides = [min(size, _LARGEST_SIDE) for size in (slot.in_features, slot.out_features)]
    lower = projection_dtype(work.model, device)
    return Rates(
        multiplications=_product_rate(rows, sides[0], sides[1], work.dtype, device),
        projections=_product_rate(rows, sides[0], sides[1], lower, device),
        values=_value_rate(device),
        are_of_a_gpu=device.type == "cuda",
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


@dataclass(frozen=True, slots=True)
class AllRates:
    """Of the owner by itself, and of each process of a team."""

    owner: Rates
    scorers: Rates
    trials: Rates

    @classmethod
    def measured(cls, work: Workload, device: torch.device) -> AllRates:
        """On this machine; those of other machines of a cluster are taken to be the same."""
        found: dict[int | None, Rates] = {}
        own = torch.get_num_threads()

        def of(team: Team) -> Rates:
            threads = own if team.threads is None else min(own, team.threads)
            if threads not in found:
                found[threads] = measured_rates(work, device, team)
            return found[threads]

        return cls(of(ALONE), of(work.scorers), of(work.trial_workers))


def seconds_by_stage(work: Workload, rates: AllRates) -> dict[str, float]:
    """What each stage of a search takes."""
    own = rates.owner
    forward = _forward_seconds(work, own)  # of a token
    tokens = work.calibration_tokens
    stages = {
        "loading": _loading(work),
        "calibrating": _calibrating(work, own, forward, tokens),
    }
    stages["scoring"] = _scoring(work, rates.scorers, stages["calibrating"])
    if work.scores_cache:
        stages["scoring cache"] = _scoring_cache(work, own, forward, tokens)
    if work.held_out_sequences:
        held_out = work.held_out_sequences * work.tokens_in_sequence
        # The original, the noise floor, and the plan.
        stages["measuring"] = 3 * forward * held_out + _rounding(work, own, "nearest")
        if work.refining is not None and work.scores_cache:  # and the refined plan with its cache
            stages["measuring"] += 2 * forward * held_out
    if work.refining is not None:
        stages["refining"] = _refining(work, own, rates.trials)
    if work.exports:
        moved = _READS * work.checkpoint_bytes / _BYTES_PER_SECOND
        rounded = 2 * _rounding(work, own, "nearest")  # written, and read back
        stages["exporting"] = moved + rounded + _STEP_SECONDS * len(work.model_map.slots)
    return stages


def _forward_seconds(work: Workload, rates: Rates) -> float:
    return _multiplications_of_a_token(work) * _BESIDE_PRODUCTS / rates.multiplications


def _loading(work: Workload) -> float:
    return work.stored_bytes * _READS / _BYTES_PER_SECOND


def seconds_divided(jobs: int, seconds_each: float, ready: Sequence[float]) -> float:
    """When so many equal jobs are done that are dealt one by one to whoever is free first.

    Args:
        ready: when each process begins.
    """
    free = list(ready)
    heapify(free)
    end = 0.0
    for _ in range(jobs):
        done = free[0] + seconds_each
        heapreplace(free, done)
        end = max(end, done)
    return end


def _multiplied(team: Team, *, is_on_gpu: bool) -> float:
    """Time of a job in a team, beside its time in one process by itself.

    One GPU that all of them share is taken to be busy with one of them alone already, so that it
    gives each its part.
    """
    if is_on_gpu and team.others and team.shares_memory:
        return _BESIDE_OTHERS * team.count
    return _BESIDE_OTHERS / team.share_of_a_core if team.others and team.shares_memory else 1.0


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


def _scoring(work: Workload, rates: Rates, calibrating: float) -> float:
    """Batches are divided; every process rounds the weights by itself, and reads the model."""
    team, formats = work.scorers, len(work.formats)
    batches = -(-work.config.calibration_sequences // work.config.batch_size)
    # Backward asks for inputs' gradients only, and blocks are computed once more for it.
    of_a_token = 3 * _forward_seconds(work, rates)
    projected = sum(slot.weights * work.share_of_tokens(slot) for slot in work.slots)
    of_a_token += formats * projected * _SAMPLED_TOKENS / rates.projections
    slower = _multiplied(team, is_on_gpu=rates.are_of_a_gpu)
    each = of_a_token * work.calibration_tokens / batches * slower
    rounding = formats * _rounding(work, rates, "nearest") * slower
    imports = _IMPORT_SECONDS if team.waits_for_start else max(0, _IMPORT_SECONDS - calibrating)
    others = imports + _loading(work) + work.calibration_bytes / _BYTES_PER_SECOND
    ready = [0.0] * team.owner_works + [others] * team.others
    return seconds_divided(batches, each, [start + rounding for start in ready])


def _scoring_cache(work: Workload, rates: Rates, forward: float, tokens: int) -> float:
    scored = work.cache_scores // work.config.calibration_sequences  # layers x formats
    passes = _CACHE_PASSES * scored * work.cached_elements * tokens
    # Once for the largest magnitudes, and then as for the weights.
    return 4 * forward * tokens + passes / rates.values


def _refining(work: Workload, own: Rates, rates: Rates) -> float:
    """Trials are divided; what is measured before and after them is the owner's alone."""
    assert work.refining is not None  # or else there is no such stage
    team = work.trial_workers
    slower = _multiplied(team, is_on_gpu=rates.are_of_a_gpu)
    forward = _forward_seconds(work, rates) * slower
    selection = forward * work.refined_tokens("selection")
    rounding = len(work.formats) * _rounding(work, rates, "nearest") * slower
    # Every process wants the original's outputs, and meets every weight in every format once.
    others = _IMPORT_SECONDS + _loading(work) + selection + rounding
    ready = [2 * selection + rounding] * team.owner_works + [others] * team.others
    trial = NEW_SHARE_OF_A_TRIAL * selection + _TRIAL_SECONDS
    trials = seconds_divided(work.refining.trials, trial, ready)
    alone = _forward_seconds(work, own)
    fresh = (1 + FINALISTS) * alone * work.refined_tokens("fresh")  # and the original
    # Whether the best one is worse than the start there, and then both for the report.
    held_out = (3 + 2) * alone * work.refined_tokens("held_out")
    return trials + fresh + held_out


def _rounding(work: Workload, rates: Rates, kind: str) -> float:
    return _ROUNDING_PASSES[kind] * work.searched_weights / rates.values
