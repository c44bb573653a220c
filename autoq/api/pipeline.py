"""The main job: from a model and a budget to a stored, measured, exported plan.

Every stage's result is in the store before the next begins, so a search that is killed at any
point and started again with the same arguments continues, and ends with the same bits.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from autoq.api.config import ScoringConfig
from autoq.api.exporting import export_plan
from autoq.api.measured import is_asked_for
from autoq.api.measuring import held_out_tokens
from autoq.api.renewal import RenewingProgress
from autoq.api.stages import (
    discovery_payload,
    is_done,
    run_calibration,
    run_discovery,
    run_measure,
    run_sensitivity,
    run_solve,
)
from autoq.api.study import (
    CALIBRATION,
    DISCOVERY,
    SENSITIVITY,
    Study,
    constrained_costs,
)
from autoq.api.targeting import best_offer, note_target, offers
from autoq.api.task import LoadedModel, ScoringTask, load, load_data, scoring_task
from autoq.errors import ExportError, UnknownNameError
from autoq.export import check_destination
from autoq.formats import FORMATS, NONE, parse_target
from autoq.models import ModelMap
from autoq.models.discovery import discover
from autoq.models.weights import check_finite
from autoq.progress import Progress, SilentProgress
from autoq.search import check_budget
from autoq.search._projections import projection_dtype
from autoq.search.estimators import DEFAULT_ESTIMATOR
from autoq.studies import StudyStore, WorkStatus, study_key

DEFAULT_STORE = "sqlite:///autoq.db"


def search(
    model: str | Path | nn.Module,
    *,
    effective_bits: float = 4.8,
    formats: Sequence[str] | None = None,
    rules: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration_data: str | None = None,
    calibration_sequences: int = 128,
    sequence_length: int = 512,
    batch_size: int = 4,
    held_out_sequences: int = 32,
    container: str | None = None,
    target: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    row_fraction: float = 1.0,
    estimator: str | None = None,
    draws: int | None = None,
    seed: int = 0,
    store: str | StudyStore = DEFAULT_STORE,
    name: str | None = None,
    export: str | Path | None = None,
    overwrite: bool = False,
    measure: bool = True,
    compare_uniform: bool = False,
    trust_remote_code: bool = False,
    wait_seconds: float = 0.0,
    progress: Progress | None = None,
) -> Study:
    """Search, measure and, if asked, export a model. Continues a search that was interrupted.

    Args:
        model: a folder with a Hugging Face model, or a model in memory.
        effective_bits: budget: mean bits per searched weight, codes and block scales.
        formats: names; None is the portable set that every engine loads, or all that `target`
            runs.
        rules: "pattern=format[,format]", binding the groups that match.
        include: globs of layers to search although they are left out by default.
        exclude: globs of layers to leave alone.
        calibration_data: a file, a `datasets` name, or None for the bundled text.
        calibration_sequences: how many sequences to calibrate and score on.
        sequence_length: tokens in each; fewer if the model has fewer positions.
        held_out_sequences: how many sequences, never calibrated on, to measure on.
        container: "modelopt" or "compressed-tensors", the checkpoint that is aimed at; None is
            the target's best, or modelopt.
        target: "ENGINE:HARDWARE" where the checkpoint is to run, for example "vllm:h200"; None
            asks nothing of formats and container.
        row_fraction: share of the tokens that are scored, in (0, 1].
        estimator: name of the way to score, one of `autoq.search.estimators.ESTIMATORS`; None is
            the one that wins the benchmark.
        draws: of labels for every sequence; None is what the estimator likes.
        store: URL of the study store, or an open one.
        name: of the study; None makes one from the model and the configuration.
        export: folder for the checkpoint; None writes none.
        overwrite: replace the export folder if it exists.
        measure: measure the plan on held-out data.
        compare_uniform: measure every format applied to all layers, too.
        wait_seconds: how long to wait for another process that works on the same study.
    Raises:
        InputError: something that was given breaks a rule; nothing that was stored is lost.
        StudyLockedError: another process works on the study.
    """
    progress = progress or SilentProgress()
    place = None if target is None else parse_target(target)
    offered = offers(place, formats, container)
    config = ScoringConfig(
        formats=offered[0].formats,
        include=tuple(include),
        exclude=tuple(exclude),
        calibration_data=_absolute_if_file(calibration_data),
        calibration_sequences=calibration_sequences,
        sequence_length=sequence_length,
        batch_size=batch_size,
        container=offered[0].container,
        dtype=dtype,
        device=device,
        row_fraction=row_fraction,
        estimator=estimator or DEFAULT_ESTIMATOR,
        draws=draws,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if place is None:
        _warn_of_narrow_formats(config, progress)
    if export is not None:
        source = None if isinstance(model, nn.Module) else model
        check_destination(Path(export), source, overwrite=overwrite)
    loaded = load(config, model)
    model_map = discover(loaded.model, include=config.include, exclude=config.exclude)
    offer, unusable = best_offer(offered, place, loaded.model, model_map)
    config = replace(config, formats=offer.formats, container=offer.container)
    if place is not None:
        note_target(place, offer, progress)
    _refuse_useless_formats(model_map, config, unusable)
    _note_lost_groups(model_map, config, unusable, progress)
    costs = constrained_costs(model_map, config.formats, rules, unusable)
    check_budget(costs, effective_bits)
    check_finite(loaded.model, model_map.slots.values())
    opened = StudyStore.open(store) if isinstance(store, str) else store
    discovered = discovery_payload(loaded, model_map, unusable)
    study, task = _open_study(opened, config, loaded, discovered, name)
    held_out = held_out_tokens(study, sequences=held_out_sequences) if measure else None
    if name is not None and study.name != name:
        progress.note(f"the same search is in the store as {study.name}; continuing that study")
    _note_other_versions(study, progress)
    _note_shorter_sequences(loaded, config, progress)
    with opened.lease(study.id, wait_seconds=wait_seconds) as lease:
        progress = RenewingProgress(progress, lease)
        if not is_done(study, DISCOVERY):
            run_discovery(study, discovered)
        if not is_done(study, CALIBRATION):
            run_calibration(study, loaded, task, progress)
        if not is_done(study, SENSITIVITY):
            run_sensitivity(study, loaded, task, progress)
        plan = run_solve(study, effective_bits, rules, target=place)
        if held_out is not None:
            run_measure(study, plan, held_out, compare_uniform, progress)
        if export is not None:
            export_plan(
                study,
                plan,
                Path(export),
                config.container,
                overwrite=overwrite,
                check_logits=True,
                progress=progress,
            )
        opened.set_status(study.id, WorkStatus.DONE)
    return study


def open_study(
    name: str | None = None,
    store: str | StudyStore = DEFAULT_STORE,
    *,
    trust_remote_code: bool = False,
) -> Study:
    """A study by name, number or unique beginning of its name; None is the newest.

    Args:
        trust_remote_code: run Python code that the model's folder brings, when the model has to be
            loaded; what the store says of it does not count.
    Raises:
        UnknownNameError: there is no such study; the message lists near misses.
    """
    opened = StudyStore.open(store) if isinstance(store, str) else store
    if name is None:
        studies = opened.list_studies()
        if not studies:
            raise UnknownNameError(
                "the store has no study yet; make one with `autoq search MODEL --bits B`"
            )
        name = max(studies, key=lambda study: study.updated).name
    return Study(opened, opened.find(name), trust_remote_code=trust_remote_code)


def list_studies(store: str | StudyStore = DEFAULT_STORE) -> list[dict[str, Any]]:
    """One entry per study: name, model, status, times, budgets and number of exports."""
    opened = StudyStore.open(store) if isinstance(store, str) else store
    return [
        {
            "name": study.name,
            "model": study.model_path,
            "status": study.status.value,
            "created": study.created,
            "updated": study.updated,
            "budgets": sorted(
                {plan.budget_bits for plan in opened.plans(study.id) if is_asked_for(plan)}
            ),
            "exports": study.exports,
        }
        for study in opened.list_studies()
    ]


def _warn_of_narrow_formats(config: ScoringConfig, progress: Progress) -> None:
    for name in config.formats:
        if not FORMATS[name].portable:
            progress.note(f"{name} is not portable: it loads in {FORMATS[name].loads_in}")


def _open_study(
    store: StudyStore,
    config: ScoringConfig,
    loaded: LoadedModel,
    discovered: Mapping[str, Any],
    name: str | None,
) -> tuple[Study, ScoringTask]:
    data = load_data(
        loaded,
        config.calibration_data,
        sequences=config.calibration_sequences,
        sequence_length=config.sequence_length,
        split="calibration",
        seed=config.seed,
    )
    # With what was discovered and the estimator in it, a version of autoq that groups or scores
    # otherwise begins another study instead of mixing its scores with the old ones.
    scored = {
        **config.to_json(),
        "calibration_sha256": data.sha256,
        "discovered": discovered,
        "projection_dtype": str(projection_dtype(loaded.model)),
    }
    key = study_key(scored, loaded.fingerprint)
    record = store.create_or_get(
        name=name or f"{_model_name(loaded)}-{key[:8]}",
        key=key,
        model_path=str(loaded.path.resolve()) if loaded.path else "",
        fingerprint=loaded.fingerprint,
        architecture=type(loaded.model).__name__,
        configuration=config.to_json(),
        versions=_versions(),
        seed=config.seed,
    )
    study = Study(store, record, loaded, trust_remote_code=config.trust_remote_code)
    return study, scoring_task(loaded, data, config)


def _absolute_if_file(source: str | None) -> str | None:
    """A study is measured later, from any folder: files are named in full."""
    return str(Path(source).resolve()) if source is not None and Path(source).exists() else source


def _note_shorter_sequences(loaded: LoadedModel, config: ScoringConfig, progress: Progress) -> None:
    longest = loaded.longest_sequence
    if longest is not None and longest < config.sequence_length:
        progress.note(f"sequences have {longest} tokens: the model has no more positions")


def _note_other_versions(study: Study, progress: Progress) -> None:
    before, now = study.record.versions, _versions()
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) != now[name]
    ]
    if changed:
        progress.note(
            f"study {study.name} was begun with other versions ({', '.join(changed)}); what it "
            "has stored stays, and the rest may differ in the last bits"
        )


def _model_name(loaded: LoadedModel) -> str:
    if loaded.path is None:
        return type(loaded.model).__name__.lower()
    return loaded.path.resolve().name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("autoq", "torch", "transformers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _refuse_useless_formats(
    model_map: ModelMap, config: ScoringConfig, unusable: Mapping[tuple[Any, Any], str]
) -> None:
    """A format that the container can hold for no group at all is refused by name."""
    for fmt in config.formats:
        reasons = [unusable.get((group.name, fmt)) for group in model_map.groups]
        if fmt != NONE and reasons and all(reasons):
            raise ExportError(
                f"the {config.container.value} container can hold no layer of this model in {fmt}: "
                f"{reasons[0]}"
            )


def _note_lost_groups(
    model_map: ModelMap,
    config: ScoringConfig,
    unusable: Mapping[tuple[Any, Any], str],
    progress: Progress,
) -> None:
    """Say which groups the container keeps unquantised: it may be most of the weights."""
    quantised = [fmt for fmt in config.formats if fmt != NONE]
    lost = [
        group.name
        for group in model_map.groups
        if all((group.name, fmt) in unusable for fmt in quantised)
    ]
    if lost:
        progress.note(
            f"the {config.container.value} container keeps {len(lost)} of "
            f"{len(model_map.groups)} groups unquantised; the first is {lost[0]}: "
            f"{unusable[lost[0], quantised[0]]}"
        )
