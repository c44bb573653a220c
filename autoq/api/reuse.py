"""Results of other studies that a new one takes over, because they would be the same bits.

A stage's result has the fingerprint of all that it depends on but the formats: the calibration of
one format, and its scores, know nothing of the others (tests/api/test_reuse.py holds them to it). So
a search for other formats, budgets or text to measure on takes from the store what is there.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoq.api._model_map_json import model_map_to_json
from autoq.api._study_batches import FINAL, stored_array
from autoq.api.study import Study
from autoq.api.study_tables import CALIBRATION, SENSITIVITY
from autoq.api.task import LoadedModel, ScoringTask
from autoq.errors import StoreError, UnknownNameError
from autoq.formats import NONE, CalibrationRecipe
from autoq.progress import Progress
from autoq.search._projections import projection_dtype
from autoq.search.estimators import FisherProjection, TokenProjection
from autoq.search.sensitivity import SCORES_VERSION
from autoq.studies import StageRecord, study_key

REUSED = "reused"
"""Key in a stage's payload: study -> the formats that were taken over from it."""

INTERACTIONS = "interactions"
"""Array of cross terms that estimators leave, [groups, formats, groups, formats]."""

COLUMNWISE = (FisherProjection.name, TokenProjection.name)
"""Estimators whose scores of a format do not depend on which others are scored."""

_CALIBRATING = ("calibration", "data", "formats", "kernels", "layers", "models")
_SCORING = (*_CALIBRATING, "search")


@dataclass(frozen=True, slots=True)
class TakenCalibration:
    """What of a calibration need not be computed."""

    records: Sequence[Mapping[str, Any]]
    sources: Mapping[str, Sequence[str]]  # study -> formats


def calibration_fingerprint(study: Study, loaded: LoadedModel, task: ScoringTask) -> str:
    """SHA-256 over all that a format's calibration depends on, beside the format."""
    config = study.config
    document = {
        "stage": CALIBRATION,
        "model_map": model_map_to_json(study.model_map),
        "tokens": _hash_of_batches(task),
        "container": config.container.value,
        "calibration": str(config.calibration),
        "dtype": str(next(loaded.model.parameters()).dtype),
        "scale_dtype": str(loaded.storage_dtype),
        "device": loaded.device.type,
        "processor": _processor(loaded.device),
        "versions": [version(name) for name in ("torch", "numpy", "transformers")],
        "model_code": _code_of_folder(loaded),
        "code": code_version(_CALIBRATING),
    }
    return study_key(document, loaded.fingerprint)


def _processor(device: torch.device) -> str:
    """What products are computed on: another kind adds up in another order."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def _code_of_folder(loaded: LoadedModel) -> list[str] | None:
    """Hashes of the Python code that the model's folder brings, where it may run."""
    if loaded.path is None or not loaded.trust_remote_code:
        return None
    files = sorted(loaded.path.rglob("*.py"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def scores_fingerprint(study: Study, loaded: LoadedModel, task: ScoringTask) -> str | None:
    """The same for a format's scores; None for a pass whose scores are of use to no other study."""
    config = study.config
    if config.estimator not in COLUMNWISE or config.confidence is not None:
        return None
    document = {
        "stage": SENSITIVITY,
        "calibration": calibration_fingerprint(study, loaded, task),
        "estimator": config.estimator,
        "draws": config.draws,
        "row_fraction": config.row_fraction,
        "seed": config.seed,
        "projection_dtype": str(projection_dtype(loaded.model, loaded.device)),
        "scores_version": SCORES_VERSION,
        "code": code_version(_SCORING),
    }
    return study_key(document, loaded.fingerprint)


def take_over_calibration(study: Study, fingerprint: str, progress: Progress) -> TakenCalibration:
    """Copy the calibration of every format that another study has, and say so.

    What is damaged there is left, to be computed anew.
    """
    wanted = {name for name in study.config.formats if name != NONE}
    records: list[Mapping[str, Any]] = []
    sources: dict[str, list[str]] = {}
    for stage in study.store.results(CALIBRATION, fingerprint):
        had = {record["format"] for record in stage.payload["records"]} & wanted
        if not had or stage.study_id == study.id:
            continue
        own = [record for record in stage.payload["records"] if record["format"] in had]
        name = _name_of(study, stage)
        if name is None:
            continue
        try:
            study.store.copy_arrays(stage.study_id, study.id, CALIBRATION, _is_of(own, had))
        except StoreError as error:
            progress.note(f"the calibration of study {name} is not reused: {error}")
            continue
        wanted -= had
        records += own
        sources[name] = sorted(had)
    _say("calibration", sources, progress)
    return TakenCalibration(records, sources)


def without_taken(study: Study, taken: TakenCalibration) -> Study | None:
    """The study as one of the formats that are left to calibrate; None where none is."""
    done = {name for names in taken.sources.values() for name in names}
    if not done:
        return study
    left = [name for name in study.config.formats if name not in done]
    if set(left) <= {NONE}:
        return None
    if isinstance(study.config.calibration, CalibrationRecipe):
        return study  # its algorithms may be for formats that were taken: all are computed anew
    configuration = {**study.record.configuration, "formats": left}
    record = replace(study.record, configuration=configuration)
    return Study(study.store, record, study.loaded(), trust_remote_code=study.trusts_remote_code)


def merged_records(
    study: Study, computed: Sequence[Mapping[str, Any]], taken: TakenCalibration
) -> list[Mapping[str, Any]]:
    """All records, in the order in which one calibration of all formats has them."""
    new = {(record["slot"], record["format"]) for record in computed}
    every = [*computed, *(r for r in taken.records if (r["slot"], r["format"]) not in new)]
    group_of = study.model_map.group_of()
    groups = {group.name: number for number, group in enumerate(study.model_map.groups)}
    formats = {name: number for number, name in enumerate(study.config.formats)}
    # Stable: slots stay in the order that calibration gives them within a group and format.
    return sorted(every, key=lambda r: (groups[group_of[r["slot"]]], formats[r["format"]]))


def take_over_scores(
    study: Study, fingerprint: str | None, progress: Progress
) -> dict[str, Any] | None:
    """Copy all scores from a study that has those of all formats, and say so.

    Of a part of the formats nothing is taken: a further format costs next to nothing beside the
    passes through the model that the others need. A pass that was begun is ended as it was begun.

    Returns:
        The payload of the stage; None where there is no such study.
    """
    columns = [name for name in study.config.formats if name != NONE]
    if fingerprint is None or study.store.score_batches(study.id):
        return None
    for stage in study.store.results(SENSITIVITY, fingerprint):
        if set(columns) <= set(stage.payload["formats"]) and stage.study_id != study.id:
            name = _name_of(study, stage)
            if name is None:
                continue
            try:
                payload = _copied_scores(study, stage, columns)
            except StoreError as error:
                progress.note(f"the scores of study {name} are not reused: {error}")
                continue
            if payload is not None:
                sources = {name: columns}
                _say("scores", sources, progress)
                return {**payload, REUSED: sources}
    return None


def _name_of(study: Study, stage: StageRecord) -> str | None:
    """Of the study that has the stage; None where it was removed meanwhile, or is damaged."""
    try:
        return study.store.study(stage.study_id).name
    except (UnknownNameError, StoreError):
        return None


def _copied_scores(
    study: Study, source: StageRecord, columns: Sequence[str]
) -> dict[str, Any] | None:
    """Some columns of another study's scores and cross terms; None where they are no columns."""
    store, source_id = study.store, source.study_id
    if (
        source.payload["estimator"] != study.config.estimator
        or stored_array(store, source_id, SENSITIVITY, FINAL) is not None
    ):
        return None
    places = [source.payload["formats"].index(name) for name in columns]
    batches = store.score_batches(source_id)
    terms = stored_array(store, source_id, SENSITIVITY, INTERACTIONS)
    # Studies go as a whole: of one that is still there, nothing was missing a moment ago.
    if _name_of(study, source) is None:
        raise StoreError("it was removed in the meantime")
    if terms is not None:
        own = np.ascontiguousarray(terms[:, places][:, :, :, places])
        store.put_array(study.id, SENSITIVITY, INTERACTIONS, own)
    for index, scores in batches.items():
        store.put_score_batch(study.id, index, np.ascontiguousarray(scores[:, :, places]), 0.0)
    kept = {name: value for name, value in source.payload.items() if name != "workers"}
    return {**kept, "formats": list(columns)}


@cache
def code_version(packages: tuple[str, ...]) -> str:
    """SHA-256 over the source of autoq's packages: what another version computes is another result."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(str(importlib.import_module(f"autoq.{package}").__path__[0]))
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _is_of(records: Sequence[Mapping[str, Any]], formats: Collection[str]) -> Callable[[str], bool]:
    """Whether an array belongs to the records of some formats: its name ends with the format.

    An importance may have the name of another format, with which it is shared.
    """
    shared = {record.get("importance") for record in records}
    return lambda name: name in shared or name.rsplit("|", 1)[-1] in formats


def _hash_of_batches(task: ScoringTask) -> str:
    digest = hashlib.sha256()
    for ids in task.batches:
        digest.update(f"{tuple(ids.shape)}".encode())
        digest.update(ids.cpu().numpy().tobytes())
    return digest.hexdigest()


def _say(what: str, sources: Mapping[str, Sequence[str]], progress: Progress) -> None:
    for name, formats in sources.items():
        progress.note(f"{what} of {', '.join(formats)} reused from study {name}")
