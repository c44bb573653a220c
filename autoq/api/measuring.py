"""Measuring a study's plan against the original model, on tokens never calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from autoq.api.task import fidelity_pairs, load_data, output_properties, token_batches
from autoq.data import TokenData
from autoq.data.sources import HELD_OUT_SHARE
from autoq.evaluators import Fidelity, measure_fidelity
from autoq.progress import Progress, SilentProgress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

Item = TypeVar("Item")


def held_out_tokens(study: Study, data: str | None = None, *, sequences: int) -> TokenData:
    """Tokens that were not calibrated on.

    Args:
        data: where they come from; None is the held-out part of the calibration data. Of another
            source everything may be used.
    Raises:
        DataError: the data cannot be read, or are too short.
    """
    calibrated_on = study.config.calibration_data
    source = calibrated_on if data is None else data
    return load_data(
        study.loaded(),
        source,
        sequences=sequences,
        sequence_length=study.config.sequence_length,
        split="held_out",
        seed=study.config.seed,
        held_out_share=HELD_OUT_SHARE if _same_source(source, calibrated_on) else 1.0,
    )


def measure_plan(
    study: Study,
    plan: PlanRecord,
    tokens: TokenData,
    *,
    data: str | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Measure a plan on tokens and store what was found.

    Args:
        data: where the tokens come from, if not from the study's own held-out data.
    """
    progress = progress or SilentProgress()
    loaded = study.loaded()
    batches = token_batches(tokens, study.config.batch_size, loaded.device)
    simulated = study.simulate(plan)
    try:
        with progress.task(f"measuring {plan.label}", len(batches)) as advance, torch.no_grad():
            pairs = fidelity_pairs(simulated, batches)
            fidelity = measure_fidelity(
                advancing(pairs, advance), **output_properties(loaded.model)
            )
    finally:
        simulated.restore()
    _store(study, plan, fidelity, tokens, data)
    return fidelity


def advancing(items: Iterable[Item], advance: Callable[[], None]) -> Iterator[Item]:
    """The items, reporting each when the next is asked for."""
    for item in items:
        yield item
        advance()


def _store(
    study: Study, plan: PlanRecord, fidelity: Fidelity, tokens: TokenData, data: str | None
) -> None:
    intervals = {
        "kl_divergence": fidelity.kl_divergence,
        "top1_agreement": fidelity.top1_agreement,
    }
    values = {}
    for metric, value in fidelity.metrics().items():
        estimate = intervals.get(metric)
        values[metric] = (value, (estimate.low, estimate.high) if estimate else None)
    study.store.add_measurements(
        study.id,
        values,
        plan_id=plan.id,
        label=plan.label,
        details={} if data is None else {"data": data},
        tokens=fidelity.tokens,
        data_sha256=tokens.sha256,
    )


def _same_source(first: str | None, second: str | None) -> bool:
    if first is None or second is None:
        return first == second
    return first == second or Path(first).resolve() == Path(second).resolve()
