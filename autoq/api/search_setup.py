"""From what a search was asked for to a study that is ready for its stages.

What can be refused is refused here: first what needs no model, then what needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoq.api.budgets import Budgets
from autoq.api.cache_plans import CacheWish
from autoq.api.config import ScoringConfig
from autoq.api.costing import check_reachable, constrained_costs, latency_note
from autoq.api.exports.adopted import is_unrecorded
from autoq.api.kv_cache import check_cache
from autoq.api.measuring import held_out_tokens
from autoq.api.quality import check_measurable
from autoq.api.refinement.edge import check_before_search
from autoq.api.refinement.refining import RefineOptions
from autoq.api.remarks import (
    installed_versions,
    note_lost_groups,
    note_other_versions,
    note_shorter_sequences,
    refuse_unwritable_formats,
    refuse_useless_formats,
)
from autoq.api.sizes import parse_bytes
from autoq.api.stages import discovery_payload
from autoq.api.streamed.memory_bound import refuse_unstreamable
from autoq.api.streamed.streaming import check_stored_finite, load_streamed, prepare_streamed
from autoq.api.study import Study
from autoq.api.targeting import Offer, Unusable, best_offer, note_target
from autoq.api.task import LoadedModel, ScoringTask, load, load_data, scoring_task
from autoq.data import TokenData
from autoq.export import check_destination
from autoq.formats import FORMATS, Target
from autoq.models import ModelMap
from autoq.models.discovery import discover
from autoq.models.weights import check_finite
from autoq.progress import Progress
from autoq.search._projections import projection_dtype
from autoq.search.sensitivity import SCORES_VERSION
from autoq.studies import StudyStore, study_key


@dataclass(frozen=True, slots=True)
class Asked:
    """What a search was asked for; see `autoq.search`. No model was looked at."""

    model: str | Path | nn.Module
    config: ScoringConfig  # with the container and the formats that are offered first
    offered: Sequence[Offer]
    place: Target | None
    budgets: Budgets
    rules: Sequence[str]
    wish: CacheWish | None
    refining: RefineOptions | None
    max_memory: str | int | None
    store: str | StudyStore
    name: str | None
    held_out_sequences: int | None  # None: nothing is measured
    export: Path | None
    overwrite: bool
    compare_uniform: bool
    workers: int
    ray: str | None

    @property
    def measures(self) -> bool:
        """Whether the plan is measured on held-out data."""
        return self.held_out_sequences is not None


@dataclass(frozen=True, slots=True)
class Ready:
    """A study and what its stages need."""

    store: StudyStore
    study: Study
    config: ScoringConfig
    loaded: LoadedModel
    discovered: Mapping[str, Any]
    data: TokenData
    task: ScoringTask
    held_out: TokenData | None


def check_asked(asked: Asked) -> None:
    """Refuse what cannot be exported or refined, whatever the model.

    Raises:
        InputError: with the rule that is broken.
    """
    if asked.export is not None:
        refuse_unwritable_formats(asked.config)
        source = None if isinstance(asked.model, nn.Module) else asked.model
        is_ours = is_unrecorded(asked.store, asked.export)  # or it is refused when that is known
        check_destination(asked.export, source, overwrite=asked.overwrite or is_ours)
    if asked.refining is not None:
        url = asked.store if isinstance(asked.store, str) else asked.store.url
        trusts = asked.config.trust_remote_code
        check_before_search(asked.refining, asked.model, url, asked.workers, trusts)


def prepare(asked: Asked, progress: Progress, *, has_crew: bool) -> Ready:
    """Look at the model, refuse what it cannot give, and open its study.

    Args:
        has_crew: whether other processes score, too.
    Raises:
        InputError: something that was asked for breaks a rule.
    """
    loaded = _loaded(asked, has_crew=has_crew)
    config, model_map, unusable = _discovered(asked, loaded, progress)
    _check_budgets(asked, config, loaded, model_map, unusable, progress)
    if loaded.stream is None:
        check_finite(loaded.model, model_map.slots.values())
    else:
        check_stored_finite(loaded, model_map)
    store = StudyStore.open(asked.store) if isinstance(asked.store, str) else asked.store
    discovered = discovery_payload(loaded, model_map, unusable)
    study, task, data = _open_study(store, config, loaded, discovered, asked.name)
    if asked.wish is not None:
        check_cache(loaded, data, study, asked.wish)
    sequences = asked.held_out_sequences
    held_out = None if sequences is None else held_out_tokens(study, sequences=sequences)
    if asked.name is not None and study.name != asked.name:
        progress.note(f"the same search is in the store as {study.name}; continuing that study")
    note_other_versions(study, progress)
    note_shorter_sequences(loaded, config, progress)
    return Ready(
        store=store,
        study=study,
        config=config,
        loaded=loaded,
        discovered=discovered,
        data=data,
        task=task,
        held_out=held_out,
    )


def _loaded(asked: Asked, *, has_crew: bool) -> LoadedModel:
    """The model in memory, or on the meta device where memory is bounded."""
    config, model = asked.config, asked.model
    if asked.max_memory is None:
        return load(config, model)
    bound = parse_bytes(asked.max_memory)
    others = (
        (asked.wish is not None, "--kv-formats"),
        (asked.refining is not None, "--refine"),
        (has_crew, "--devices, --ray and torchrun"),
        (asked.budgets.max_kl is not None and asked.measures, "--max-kl with measuring"),
    )
    refuse_unstreamable(config, is_module=isinstance(model, nn.Module), others=others)
    assert not isinstance(model, nn.Module)  # refused
    return load_streamed(config, model, bound)


def _discovered(
    asked: Asked, loaded: LoadedModel, progress: Progress
) -> tuple[ScoringConfig, ModelMap, Unusable]:
    """The layers, and the container and formats that suit them best."""
    config = asked.config
    model_map = discover(loaded.model, include=config.include, exclude=config.exclude)
    offer, unusable = best_offer(asked.offered, asked.place, loaded.model, model_map)
    config = replace(config, formats=offer.formats, container=offer.container)
    if loaded.stream is not None:
        prepare_streamed(loaded, model_map, config)
    if asked.place is not None:
        note_target(asked.place, offer, progress)
    refuse_useless_formats(model_map, config, unusable)
    note_lost_groups(model_map, config, unusable, progress)
    return config, model_map, unusable


def _check_budgets(
    asked: Asked,
    config: ScoringConfig,
    loaded: LoadedModel,
    model_map: ModelMap,
    unusable: Unusable,
    progress: Progress,
) -> None:
    costs = constrained_costs(model_map, config.formats, asked.rules, unusable)
    check_reachable(loaded, model_map, config, costs, asked.budgets)
    if asked.budgets.max_kl is not None and asked.measures:
        check_measurable(loaded)
    note = latency_note(asked.budgets, model_map)
    if note is not None:
        progress.note(note)


def _open_study(
    store: StudyStore,
    config: ScoringConfig,
    loaded: LoadedModel,
    discovered: Mapping[str, Any],
    name: str | None,
) -> tuple[Study, ScoringTask, TokenData]:
    """The study of just this, new or as it was left; what calibrates and scores it; its tokens."""
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
        "projection_dtype": str(projection_dtype(loaded.model, loaded.device)),
        "scores_version": SCORES_VERSION,
    }
    steps = [FORMATS[fmt].algorithm(config.calibration) for fmt in config.formats]
    if any(step.weighs_outputs for step in steps):
        scored["block_scales_by"] = "outputs"  # which they were not in earlier versions
    key = study_key(scored, loaded.fingerprint)
    record = store.create_or_get(
        name=name or f"{_model_name(loaded)}-{key[:8]}",
        key=key,
        model_path=str(loaded.path.resolve()) if loaded.path else "",
        fingerprint=loaded.fingerprint,
        architecture=type(loaded.model).__name__,
        configuration=config.to_json(),
        versions=installed_versions(),
        seed=config.seed,
    )
    study = Study(store, record, loaded, trust_remote_code=config.trust_remote_code)
    return study, scoring_task(loaded, data, config), data


def _model_name(loaded: LoadedModel) -> str:
    if loaded.path is None:
        return type(loaded.model).__name__.lower()
    return loaded.path.resolve().name
