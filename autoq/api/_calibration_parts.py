"""The calibration of a model that is read block by block, stored block by block as it is found.

Beside a block's arrays, and in one transaction with them, its records go into the store, with the
arrays' hashes and the fingerprint of all that they follow from. A search that was killed takes up the
blocks that are there as they were written, and whose fingerprint is its own. When the stage ends, its payload has the records of all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoq.api import reuse
from autoq.api._study_batches import stored_array
from autoq.api.serialize import array_names, calibration_to_plain
from autoq.api.study_tables import CALIBRATION
from autoq.errors import StoreError
from autoq.export.block_calibration import blocks_to_calibrate
from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.models import SlotName
from autoq.progress import Advance, Progress
from autoq.studies import study_key

if TYPE_CHECKING:
    from autoq.api.study import Study

_PART = "part|"
"""Names of arrays begin so that hold a block's records as JSON; its number follows."""

_STREAMING = ("api.streamed", "export")
"""Packages that calibrate block by block, beside those that calibrate a model in memory, too."""

_Key = tuple[SlotName, FormatName]


class CalibrationParts:
    """A study's calibration on its way into the store, a block at a time."""

    def __init__(self, study: Study, fingerprint: str) -> None:
        """
        Args:
            study: of the formats that are calibrated.
            fingerprint: of its calibration, see `autoq.api.reuse.calibration_fingerprint`.
        """
        self._study = study
        document = {
            "calibration": fingerprint,
            "formats": list(study.config.formats),
            # On a CPU factors and sums of whole tensors are added up thread by thread.
            "threads": torch.get_num_threads(),
            "code": reuse.code_version(_STREAMING),
        }
        self._fingerprint = study_key(document, study.record.model_fingerprint)
        self._records: dict[int, list[dict[str, Any]]] = {}

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the blocks that are calibrated."""
        return frozenset(self._records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the stage is to store beside the arrays, which are in the store."""
        return [record for number in sorted(self._records) for record in self._records[number]]

    def take_up(self, progress: Progress, advance: Advance) -> None:
        """Find what a search that was killed has left, and say where this one goes on."""
        blocks = self._study.model_map.blocks
        foreign = 0
        for number, path in enumerate(blocks):
            advance(0)  # reading them all may take a while
            try:
                part = self._part(number)
                if part is None:
                    continue
                if part["fingerprint"] != self._fingerprint:
                    foreign += 1
                    continue
                self._check_arrays(part["records"], part["hashes"])
            except StoreError as error:
                progress.note(f"the calibration of {path} is computed anew: {error}")
                continue
            self._records[number] = part["records"]
        if foreign:
            progress.note(
                f"what a search that was killed has left of the calibration, of {foreign} blocks, is "
                "computed anew: it is of another version, processor, number of threads or choice of "
                "formats"
            )
        if self._records:
            missing = blocks_to_calibrate(self._study.model_map) - self.done
            progress.note(_where(self._records, missing, len(blocks)))

    def add(self, entries: Mapping[_Key, LayerCalibration], block: int | None) -> None:
        """See `autoq.export.block_calibration.TakesCalibrations`."""
        assert block is not None  # layers outside blocks were refused
        records, arrays = calibration_to_plain(entries)
        hashes = {name: _hash_of(array) for name, array in arrays.items()}
        document = {"fingerprint": self._fingerprint, "records": records, "hashes": hashes}
        part = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
        named = {**arrays, f"{_PART}{block}": part}
        self._study.store.put_arrays(self._study.id, CALIBRATION, named)
        self._records[block] = records

    def _part(self, number: int) -> dict[str, Any] | None:
        """What is stored of a block beside its arrays, None where it was not calibrated.

        Raises:
            StoreError: it is damaged.
        """
        part = self._array(f"{_PART}{number}")
        return None if part is None else dict(json.loads(part.tobytes()))

    def _check_arrays(
        self, records: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]
    ) -> None:
        """
        Raises:
            StoreError: one is damaged, not there, or another than was written with the records: a
                search by another version, or what it took over, may have replaced it.
        """
        for name in dict.fromkeys(name for record in records for name in array_names(record)):
            array = self._array(name)
            if array is None:
                raise StoreError(f"array {name!r} is not in the store")
            if _hash_of(array) != hashes[name]:
                raise StoreError(f"array {name!r} was replaced by another search in the meantime")

    def _array(self, name: str) -> NDArray[Any] | None:
        return stored_array(self._study.store, self._study.id, CALIBRATION, name)


def _hash_of(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _where(done: Collection[int], missing: Collection[int], blocks: int) -> str:
    if not missing:
        return f"calibration taken up behind block {blocks} of {blocks}, the last"
    first = min(missing)
    later = sum(number > first for number in done)
    more = f"; {later} behind it are calibrated" if later else ""
    return f"calibration taken up at block {first + 1} of {blocks}{more}"
