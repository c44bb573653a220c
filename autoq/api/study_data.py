"""What the store has of one search, and the model that was searched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autoq.api.study_tables import CALIBRATION, DISCOVERY, StudyTables
from autoq.errors import ModelError, StoreError
from autoq.formats import FormatName
from autoq.models import SlotName
from autoq.studies import StudyRecord, StudyStore

if TYPE_CHECKING:
    import torch

    from autoq.api.task import LoadedModel
    from autoq.layers import LayerCalibration


class StudyData(StudyTables):
    """What the store has of one search, and the model that was searched."""

    def __init__(
        self,
        store: StudyStore,
        record: StudyRecord,
        loaded: LoadedModel | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(store, record)
        self._trust_remote_code = trust_remote_code
        self._loaded = loaded

    @property
    def trusts_remote_code(self) -> bool:
        """Whether Python code that the model's folder brings may run."""
        return self._trust_remote_code

    @cached_property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the model's weights on disk."""
        import torch

        dtype: torch.dtype = getattr(torch, self.finished(DISCOVERY)["storage_dtype"])
        return dtype

    @cached_property
    def calibration(self) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
        """The calibrated parameters of every slot in every format."""
        from autoq.api.serialize import calibration_from_plain

        arrays = self._store.arrays(self.id, CALIBRATION)
        return calibration_from_plain(self.finished(CALIBRATION)["records"], arrays)

    def loaded(self) -> LoadedModel:
        """The original model; read from its folder when it is first needed.

        Raises:
            ModelError: the folder does not hold the model that was searched.
        """
        if self._loaded is None:
            if not self._record.model_path:
                raise ModelError(
                    f"study {self.name} was made from a model in memory; measuring and exporting "
                    "need it again: call autoq.search with the model"
                )
            from autoq.api.task import load

            # A store may come from somebody else: it cannot grant trust.
            config = replace(self.config, trust_remote_code=self._trust_remote_code)
            loaded = load(config, self._record.model_path)
            if loaded.fingerprint != self._record.model_fingerprint:
                raise ModelError(
                    f"{self._record.model_path} has changed since study {self.name} was made "
                    "(fingerprints differ); search it again"
                )
            self._loaded = loaded
        return self._loaded

    @contextmanager
    def repeated_stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A stage that every budget runs anew; what is put into the payload is stored with it."""
        payload: dict[str, Any] = {}
        started = time.perf_counter()
        self._store.reset_stage(self.id, name)
        self._store.begin_stage(self.id, name)
        try:
            yield payload
        except BaseException as error:
            seconds = time.perf_counter() - started
            with suppress(StoreError):  # it may be the store that failed; then that is said
                self._store.fail_stage(self.id, name, seconds, f"{type(error).__name__}: {error}")
            raise
        self._store.finish_stage(self.id, name, time.perf_counter() - started, payload)
