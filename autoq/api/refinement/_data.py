"""Which tokens a refinement chooses by, which it confirms by, and which it reports on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autoq.api.measuring import held_out_tokens
from autoq.api.task import load_data
from autoq.data import TokenData
from autoq.data.sources import token_data
from autoq.errors import DataError

if TYPE_CHECKING:
    from autoq.api.refinement.options import RefineOptions
    from autoq.api.study import Study

FEWEST_FRESH = 8
"""Sequences; with fewer a paired difference says next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmations:
    """Those of a plan's refinements that are stored already."""

    count: int = 0
    sequences: int = 0  # of the calibration data past what was calibrated on, used up by them


@dataclass(frozen=True, slots=True)
class RefineData:
    """Three parts without a token in common."""

    selection: TokenData  # what trials are measured on
    fresh: TokenData  # what the best ones are confirmed on; it chose nothing
    report: TokenData  # held out
    remark: str | None  # what the user should know of how they were parted
    fresh_until: int = 0
    """Where in the calibration data `fresh` ends, in sequences past what was calibrated on; 0 where
    it is a part of what is held out."""


def refine_data(
    study: Study, options: RefineOptions, before: Confirmations = Confirmations()
) -> RefineData:
    """Part the study's data.

    Trials are measured on the first sequences of the calibration data, finalists on what follows
    what was calibrated and scored on, and what earlier confirmations used. Where a file has too
    little left, they are measured on a part of what is held out, which is then not reported on.

    Raises:
        DataError: the data can no longer be read, or are too short for all three.
    """
    selected = _calibration(study, min(options.sequences, study.config.calibration_sequences))
    for used in dict.fromkeys((before.sequences, 0)):
        found = _past_calibration(study, options, used)
        if found is not None:
            fresh, until = found
            report = held_out_tokens(study, sequences=options.held_out_sequences)
            remarks = [
                _fewer(len(fresh.ids), options.fresh_sequences),
                _used_again(before) if used < before.sequences else "",
            ]
            remark = "; ".join(filter(None, remarks)) or None
            return RefineData(selected, fresh, report, remark, until)
    parted = _parted_held_out(study, options, selected)
    if before.count == 0:
        return parted
    return replace(parted, remark=f"{parted.remark}; {_used_again(before)}")


def _past_calibration(
    study: Study, options: RefineOptions, used: int
) -> tuple[TokenData, int] | None:
    """Tokens after those calibrated on and those used, and where they end; None: too few are left."""
    calibrated = study.config.calibration_sequences
    for count in _counts(options.fresh_sequences):
        try:
            more = _calibration(study, calibrated + used + count)
        except DataError:
            continue
        about = f"{more.description}, not calibrated on"
        if used:
            about += f", after {used} sequences"
        return token_data(more.ids[calibrated + used :], about), used + count
    return None


def _counts(wanted: int) -> Iterator[int]:
    """What is wanted, or half of it, and so on down to what still says something."""
    yield wanted
    while wanted // 2 > FEWEST_FRESH:
        wanted //= 2
        yield wanted
    yield FEWEST_FRESH


def _fewer(found: int, wanted: int) -> str:
    """What to say of too few fresh sequences; nothing where there are enough."""
    if found >= wanted:
        return ""
    return (
        f"the calibration data has few tokens left, so finalists are confirmed on {found} fresh "
        f"sequences instead of {wanted}: only large differences are found"
    )


def _used_again(before: Confirmations) -> str:
    return (
        "no tokens are left that no confirmation of this plan has used, so finalists are confirmed "
        f"on the same tokens again (confirmation {before.count + 1}): the more often, the likelier "
        "one is accepted by luck"
    )


def _parted_held_out(study: Study, options: RefineOptions, selected: TokenData) -> RefineData:
    wanted = options.held_out_sequences
    for fresh in _counts(options.fresh_sequences):
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
