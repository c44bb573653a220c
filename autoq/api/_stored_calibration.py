"""The calibration of a study, read from its store entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from autoq.api.serialize import entry_from_plain, key_of
from autoq.api.study_tables import CALIBRATION
from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.models import SlotName

if TYPE_CHECKING:
    from autoq.api.study import Study

_Key = tuple[SlotName, FormatName]


class CalibrationInStore(Mapping[_Key, LayerCalibration]):
    """What `Study.calibration` has, of which the last entry that was looked up is in memory.

    With all codes of all formats it is larger than a quantised model.
    """

    def __init__(self, study: Study) -> None:
        """
        Raises:
            InputError: the study is not calibrated.
        """
        records = study.finished(CALIBRATION)["records"]
        self._records = {key_of(record): record for record in records}
        self._array = partial(study.store.get_array, study.id, CALIBRATION)
        self._last: tuple[_Key, LayerCalibration] | None = None

    def __getitem__(self, key: _Key) -> LayerCalibration:
        if self._last is None or self._last[0] != key:
            record = self._records[key]
            self._last = None  # so that two are never in memory
            self._last = key, entry_from_plain(record, self._tensor)
        return self._last[1]

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self._array(name)))
