"""What a search will write, and what is free where it will."""

from __future__ import annotations

import shutil
from pathlib import Path

from autoq.api.preflight.workload import Workload
from autoq.api.refinement.refining import SHARE_OF_FREE_DISK
from autoq.evaluators.cache import DEFAULT_BYTES

_STORED_TWICE = 2
"""Arrays in the store's file, and in its log of what is being written."""

_TRIAL_BYTES = 6 << 10
"""Rows of a trial beside its plan and its losses."""

_LOG_BYTES = 4 << 20
"""Of SQLite's log of what is being written, at its largest; trials, written one by one, fill it."""

_NUMBER_BYTES = 22  # of a number in JSON
_NAME_BYTES = 20  # of a group's format in JSON, beside the group's name


def store_bytes(work: Workload) -> int:
    """Of the store's file when the search is over, its log of what is being written included."""
    groups = len(work.model_map.groups)
    scores = work.config.calibration_sequences * groups * len(work.config.formats) * 8
    found = _STORED_TWICE * work.calibration_bytes + scores + (1 << 20)
    if work.scores_cache:
        found += _STORED_TWICE * work.cache_scores * 8  # by batch, and then as a whole
    if work.refining is not None:
        plan = sum(len(group.name) + _NAME_BYTES for group in work.model_map.groups)
        losses = work.refined_sequences("selection") * _NUMBER_BYTES
        found += _LOG_BYTES + work.refining.trials * (plan + losses + _TRIAL_BYTES)
    return found


def outputs_bytes(work: Workload, store_file: Path | None) -> int:
    """Of the original's outputs, which trials share beside a store that is a file.

    Where they do not fit there to the bit they are not kept.
    """
    if work.refining is None:
        return 0
    needed = work.refined_tokens("selection") * work.output_width * work.dtype.itemsize
    if work.refining.outputs is not None:
        return needed if needed <= DEFAULT_BYTES else 0
    if store_file is None:
        return 0
    bound = min(DEFAULT_BYTES, int(SHARE_OF_FREE_DISK * free_disk_bytes(store_file)))
    return needed if needed <= bound else 0


def free_disk_bytes(place: Path) -> int:
    """What is free where a file or folder is, or will be."""
    above = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(above).free
