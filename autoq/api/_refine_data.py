"""Which tokens a refinement chooses by, which it confirms by, and which it reports on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoq.api.measuring import held_out_tokens
from autoq.api.task import load_data
from autoq.data import TokenData
from autoq.data.sources import token_data
from autoq.errors import DataError

if TYPE_CHECKING:
    from autoq.api.refining import RefineOptions
    from autoq.api.study import Study

FEWEST_FRESH = 8
"""Sequences; with fewer a paired difference says next to nothing."""


@dataclass(frozen=True, slots=True)
class RefineData:
    """Three parts without a token in common."""

    selection: TokenData  # what trials are measured on
    fresh: TokenData  # what the best ones are confirmed on; it chose nothing
    report: TokenData  # held out
    remark: str | None  # what the user should know of how they were parted


def refine_data(study: Study, options: RefineOptions) -> RefineData:
    """Part the study's data.

    Trials are measured on the first sequences of the calibration data, finalists on what follows
    what was calibrated and scored on. Where a file has too little left, they are measured on a
    part of what is held out, which is then not reported on.

    Raises:
        DataError: the data can no longer be read, or are too short for all three.
    """
    calibrated = study.config.calibration_sequences
    selected = _calibration(study, min(options.sequences, calibrated))
    for count in (options.fresh_sequences, FEWEST_FRESH):
        try:
            more = _calibration(study, calibrated + count)
        except DataError:
            continue
        fresh = token_data(more.ids[calibrated:], f"{more.description}, not calibrated on")
        report = held_out_tokens(study, sequences=options.held_out_sequences)
        return RefineData(selected, fresh, report, None)
    return _parted_held_out(study, options, selected)


def _parted_held_out(study: Study, options: RefineOptions, selected: TokenData) -> RefineData:
    wanted = options.held_out_sequences
    for fresh in (options.fresh_sequences, FEWEST_FRESH):
        try:
            held_out = held_out_tokens(study, sequences=wanted + fresh)
        except DataError:
            continue
        return RefineData(
            selected,
            token_data(held_out.ids[wanted:], f"{held_out.description}, its last {fresh}"),
            held_out_tokens(study, sequences=wanted),
            "all calibration data was calibrated on, so finalists are confirmed on "
            f"{fresh} held-out sequences that are not reported on",
        )
    held_out = held_out_tokens(study, sequences=wanted)
    half = wanted // 2
    return RefineData(
        selected,
        token_data(held_out.ids[half:], f"{held_out.description}, its second half"),
        token_data(held_out.ids[:half], f"{held_out.description}, its first half"),
        "the data has no tokens left, so the held-out part is split: finalists are confirmed on "
        f"{wanted - half} sequences, and {half} are reported on",
    )


def _calibration(study: Study, sequences: int) -> TokenData:
    return load_data(
        study.loaded(),
        study.config.calibration_data,
        sequences=sequences,
        sequence_length=study.config.sequence_length,
        split="calibration",
        seed=study.config.seed,
    )
