"""What a worker is told, and what it does: score batches as the process that owns the study would."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoq.api._model_map_json import model_map_from_json, model_map_to_json
from autoq.api.config import ScoringConfig
from autoq.api.distribution.messages import Message
from autoq.api.remarks import installed_versions
from autoq.api.scoring import ScoredBatch, make_scoring_estimator
from autoq.api.serialize import calibration_from_plain
from autoq.api.study import Study
from autoq.api.study_tables import CALIBRATION
from autoq.api.task import LoadedModel, load, scoring_task
from autoq.data.sources import TokenData, token_data
from autoq.errors import InputError, ModelError
from autoq.layers import LayerCalibration
from autoq.models import ModelMap
from autoq.search._projections import projection_dtype
from autoq.search.estimators import Estimator

_IDS = "token_ids"
_SCORES = "scores"


def to_arrays(scored: ScoredBatch) -> dict[str, NDArray[Any]]:
    """Arrays by name; `from_arrays` gives the value back."""
    return {_SCORES: scored.scores, **scored.addition}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> ScoredBatch:
    """The value that `to_arrays` was given."""
    addition = dict(arrays)
    return ScoredBatch(addition.pop(_SCORES), addition)


def scoring_order(study: Study, loaded: LoadedModel, data: TokenData) -> Message:
    """Everything that a worker needs beside the model's folder, for `BatchScorer`."""
    stage = study.store.stage(study.id, CALIBRATION)
    assert stage is not None  # scoring comes after it
    header = {
        "versions": installed_versions(),
        "model": study.record.model_path,
        "fingerprint": loaded.fingerprint,
        "configuration": study.config.to_json(),
        "trust_remote_code": loaded.trust_remote_code,
        "model_map": model_map_to_json(study.model_map),
        "calibration": stage.payload["records"],
        "projection_dtype": str(projection_dtype(loaded.model)),
        "device_type": loaded.device.type,
    }
    return Message(header, {_IDS: data.ids, **study.store.arrays(study.id, CALIBRATION)})


class BatchScorer:
    """Scores any batch of a study, bit for bit as its owner would."""

    def __init__(self, order: Message, *, device: str, threads: int) -> None:
        """
        Args:
            order: what `scoring_order` gave.
            device: where to score; of the kind that the owner scores on.
            threads: of the CPU.
        Raises:
            InputError: another version of a package is installed here, or numbers here are others.
            ModelError: the model cannot be read here, or is another.
        """
        header = order.header
        refuse_other_versions(header["versions"])
        torch.set_num_threads(threads)
        config = ScoringConfig.from_json(header["configuration"])
        self._config = replace(config, device=device, trust_remote_code=header["trust_remote_code"])
        self._loaded = _same_model(self._config, header)
        self._model_map: ModelMap = model_map_from_json(header["model_map"])
        arrays = dict(order.arrays)
        data = token_data(np.array(arrays.pop(_IDS)), "sent by the owner of the study")
        self._calibration: Mapping[Any, LayerCalibration] = calibration_from_plain(
            header["calibration"], arrays
        )
        self._task = scoring_task(self._loaded, data, self._config)
        self._estimators: dict[str, Estimator] = {}

    def score(self, index: int, estimator: str) -> ScoredBatch:
        """Score the batch with this number.

        Args:
            estimator: name of the one that scores.
        """
        scorer = self._estimator(estimator)
        scores = scorer.score_batch(index, partial(self._task.loss, index))
        return ScoredBatch(scores, scorer.addition())

    def _estimator(self, name: str) -> Estimator:
        if name not in self._estimators:
            self._estimators.clear()  # a pass goes over to another one only once
            made = make_scoring_estimator(
                name, self._loaded, self._model_map, self._calibration, self._config
            )
            made.keep_batches_apart()
            self._estimators[name] = made
        return self._estimators[name]

    def about(self) -> dict[str, Any]:
        """Where this is, as plain data."""
        device = self._loaded.device
        is_cuda = device.type == "cuda"
        return {
            "host": platform.node(),
            "process": os.getpid(),
            "device": str(device),
            "hardware": torch.cuda.get_device_name(device) if is_cuda else _cpu_kind(),
            "threads": torch.get_num_threads(),
        }


def refuse_other_versions(wanted: Mapping[str, str]) -> None:
    """Scores of other versions may differ in their last bits, and would make a study of two kinds.

    Raises:
        InputError: a package is installed here in another version than the owner has.
    """
    found = installed_versions()
    changed = [
        f"{name} {found.get(name, 'not installed')} instead of {version}"
        for name, version in wanted.items()
        if found.get(name) != version
    ]
    if changed:
        raise InputError(
            "workers must have the versions of the process that owns the study, and "
            f"{platform.node()} has {', '.join(changed)}; install those"
        )


def _same_model(config: ScoringConfig, header: Mapping[str, Any]) -> LoadedModel:
    loaded = load(config, header["model"])
    if loaded.fingerprint != header["fingerprint"]:
        raise ModelError(
            f"workers must read the model that is searched, and {header['model']} on "
            f"{platform.node()} is another (fingerprints differ); copy the folder there"
        )
    if loaded.device.type != header["device_type"]:
        raise InputError(
            f"workers must score on the kind of device that the owner of the study has, "
            f"{header['device_type']}, and {platform.node()} has {loaded.device.type}; use machines "
            "of one kind, or --device cpu"
        )
    own = str(projection_dtype(loaded.model))
    if own != header["projection_dtype"]:
        raise InputError(
            f"workers must multiply in {header['projection_dtype']}, which the owner of the study does, "
            f"and {platform.node()} multiplies in {own}; use machines of one kind"
        )
    return loaded


def _cpu_kind() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
