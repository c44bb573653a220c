"""The key/value cache of a study: what is wished for, scored once, chosen with every plan.

The choice is separate from that of the weights: scores, budget and solution of its own. A plan with a
cache is the plan of the weights with the choice in its details; predicted losses add up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from autoq.api._cache_batches import CacheBatches
from autoq.api.task import LoadedModel, own_distribution_task
from autoq.calibration.kv_cache import calibrate_cache
from autoq.data import TokenData
from autoq.errors import ExportError, InputError
from autoq.export import ExportedCache, cache_refusal
from autoq.formats import NONE, Container, FormatName, Target
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal
from autoq.formats.kv_cache_support import kv_cache_reason
from autoq.layers.kv_cache import CachedLayer, CacheSimulation, cached_layers
from autoq.models import GroupName
from autoq.progress import Progress, in_turn
from autoq.search import Plan, SensitivityTable
from autoq.search.estimators import DEFAULT_ESTIMATOR
from autoq.search.kv_cache import CacheScope, CacheScorer, check_cache_formats, choose_cache
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

KV_CACHE = "kv_cache"
"""The stage of a study that scores the cache, and the key of the choice in a plan's details."""

_ENGINE_CHECKPOINT = "tensorrt-llm"  # what `export` calls it; it refuses caches by itself

DEFAULT_BITS = 8.0
_NATS = "nats_per_token"
_SCOPES: tuple[CacheScope, ...] = ("model", "layer")
_OF_THE_SOLVER = ("budgets", "takes", "least")  # details that a `Plan` has as fields of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheWish:
    """What the cache may be, as users say it."""

    formats: tuple[FormatName, ...]  # offered, "none" possibly among them
    bits: float = DEFAULT_BITS  # budget: mean per cached element, block scales counted
    scope: CacheScope = "model"

    def label(self) -> str:
        """What a plan's label says of it."""
        each = " per layer" if self.scope == "layer" else ""
        return f"KV cache of {','.join(self.formats)} at {self.bits:g} bits{each}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheWish:
        """The value that `to_json` came from."""
        return cls(**{**data, "formats": tuple(data["formats"])})


def cache_wish(
    formats: Sequence[str] | None,
    bits: float | None,
    scope: str | None,
    *,
    target: Target | None,
    container: Container | None,
    max_kl: float | None = None,
) -> CacheWish | None:
    """What is wished for the cache; None where its format is not asked about.

    Args:
        target: where the checkpoint is to run, if that was said.
        container: that it is to be written in, if that was said.
    Raises:
        InputError: an option lacks --kv-formats or breaks a rule, or the target or the container
            cannot hold what is offered; says which, and why.
        UnknownNameError: a format is not known.
    """
    if formats is None:
        if bits is not None or scope is not None:
            raise InputError(
                "--kv-bits and --kv-scope need the formats of the key/value cache to choose from; give "
                "--kv-formats, for example --kv-formats fp8,nvfp4"
            )
        return None
    if scope not in (None, *_SCOPES):
        raise InputError(f"--kv-scope must be {' or '.join(_SCOPES)}, got {scope!r}")
    wish = CacheWish(
        formats=tuple(KV_CACHE_FORMATS[name].name for name in dict.fromkeys(formats)),
        bits=DEFAULT_BITS if bits is None else bits,
        scope="layer" if scope == "layer" else "model",
    )
    check_cache_formats((), wish.formats, wish.bits, "model")
    if max_kl is not None:
        raise InputError(
            "--max-kl measures plans of weights alone, so it cannot be had with --kv-formats; give a "
            "budget in bits or bytes"
        )
    _refuse_unfit(wish, target, container)
    return wish


def _refuse_unfit(wish: CacheWish, target: Target | None, container: Container | None) -> None:
    if container is None:
        return
    if wish.scope == "layer":
        raise InputError(
            f"{container} checkpoints state one format of the key/value cache for all layers; leave "
            "out --kv-scope layer, or --container, --target and --export"
        )
    for name in wish.formats:
        reason = None if target is None else kv_cache_reason(target, container, name)
        reason = reason or kv_cache_refusal(name, container)
        if reason is not None:
            place = f"{target} from {container}" if target is not None else str(container)
            raise InputError(f"--kv-formats {name} does not go with {place}: {reason}")


def check_cache(loaded: LoadedModel, data: TokenData, study: Study, wish: CacheWish) -> None:
    """Refuse what this model cannot do, before anything is computed.

    Raises:
        ModelError: it has no key/value cache that can be seen.
        InputError: no choice takes so few bits, or a layer can take none of the formats.
    """
    task = own_distribution_task(loaded, data, study.config)
    check_cache_formats(
        cached_layers(loaded.model, task.run_small), wish.formats, wish.bits, wish.scope
    )


def run_cache_scores(
    study: Study, loaded: LoadedModel, data: TokenData, progress: Progress
) -> None:
    """Find the cache's scales, and score every layer in every format, unless that was done before.

    Scores do not depend on what is offered, so every wish of the study takes them from here. A pass
    that was killed goes on behind its last batch.
    """
    known = study.store.stage(study.id, KV_CACHE)
    if known is not None and known.status is WorkStatus.DONE:
        return
    started = time.perf_counter()
    study.store.begin_stage(study.id, KV_CACHE)
    # Losses with the noise of the default estimator, whatever scores the weights.
    task = own_distribution_task(loaded, data, replace(study.config, estimator=DEFAULT_ESTIMATOR))
    steps = len(task.batches)
    kept = CacheBatches(study.store, study.id, KV_CACHE)
    with in_turn(
        progress, ("calibrating the KV cache", steps), ("scoring the KV cache", steps)
    ) as (after_batch, after_score):
        layers = cached_layers(loaded.model, task.run_small)
        if not kept.is_calibrated:
            run = task.run_layers
            found = calibrate_cache(loaded.model, layers, task.batches, run, after_batch)
            kept.put_magnitudes(found)
        layers = kept.with_magnitudes(layers)
        scorer = CacheScorer(
            loaded.model, study.model_map, layers, [FormatName(name) for name in KV_CACHE_FORMATS]
        )
        for index in range(steps):
            if not kept.has(index):
                kept.put(index, scorer.score_batch(partial(task.loss, index)))
            after_score()
    contributions = np.concatenate([kept.get(index) for index in range(steps)])
    study.store.put_arrays(study.id, KV_CACHE, {"contributions": contributions})
    kept.drop()
    payload = {"layers": [asdict(layer) for layer in layers], "formats": list(scorer.formats)}
    study.store.finish_stage(study.id, KV_CACHE, time.perf_counter() - started, payload)


def stored_layers(study: Study) -> tuple[CachedLayer, ...]:
    """The layers that cache, with their calibrated magnitudes; empty where none was looked for."""
    found = study.store.stage(study.id, KV_CACHE)
    if found is None or found.status is not WorkStatus.DONE:
        return ()
    return tuple(CachedLayer(**entry) for entry in found.payload["layers"])


def _scores(study: Study, layers: Sequence[CachedLayer]) -> SensitivityTable:
    stage = study.store.stage(study.id, KV_CACHE)
    assert stage is not None  # there are layers
    return SensitivityTable(
        groups=tuple(GroupName(layer.name) for layer in layers),
        formats=tuple(FormatName(name) for name in stage.payload["formats"]),
        contributions=study.store.arrays(study.id, KV_CACHE)["contributions"],
        unit=_NATS,
        estimator=DEFAULT_ESTIMATOR,
    )


def with_cache(study: Study, plan: PlanRecord, wish: CacheWish) -> PlanRecord:
    """The plan of weights with the best cache that the wish allows, stored.

    Raises:
        InputError: the study's cache was not scored, or the wish cannot be met.
    """
    layers = stored_layers(study)
    if not layers:
        raise InputError(
            f"study {study.name} has no scores of the key/value cache; search again with --kv-formats"
        )
    chosen = choose_cache(_scores(study, layers), layers, wish.formats, wish.bits, wish.scope)
    whole = plan.to_plan()
    if study.sensitivity.unit == _NATS:
        whole = _added(whole, chosen)
    elements = sum(layer.elements for layer in layers)
    details = {
        **{key: value for key, value in plan.details.items() if key not in _OF_THE_SOLVER},
        KV_CACHE: {
            "of_plan": plan.id,
            "formats": dict(chosen.assignment),
            "wish": wish.to_json(),
            "bits": chosen.effective_bits,
            "bytes_per_token": chosen.effective_bits * elements / 8,
            "predicted_loss": chosen.predicted_loss,
            "predicted_loss_interval": list(chosen.predicted_loss_interval),
            "gap": chosen.gap,
        },
    }
    label = f"{plan.label}, {wish.label()}"
    return study.store.plan(study.store.add_plan(study.id, whole, label=label, details=details))


def _added(plan: Plan, cache: Plan) -> Plan:
    """Both losses; ends of intervals are added, too, which makes them no narrower than they are."""
    low, high = plan.predicted_loss_interval
    loss, bound = plan.predicted_loss + cache.predicted_loss, plan.bound + cache.bound
    return replace(
        plan,
        predicted_loss=loss,
        predicted_loss_interval=(
            low + cache.predicted_loss_interval[0],
            high + cache.predicted_loss_interval[1],
        ),
        bound=bound,
        gap=(loss - bound) / loss if loss > 0.0 else 0.0,
    )


def cache_formats(plan: PlanRecord) -> dict[str, FormatName]:
    """Layer -> format of the plan's cache; empty where it has no say in that."""
    found = plan.details.get(KV_CACHE)
    return {} if found is None else {k: FormatName(v) for k, v in found["formats"].items()}


def plan_of_weights(study: Study, plan: PlanRecord) -> PlanRecord:
    """The plan without its cache, which is another plan of the study; itself if it has none."""
    found = plan.details.get(KV_CACHE)
    return plan if found is None else study.store.plan(found["of_plan"])


def wish_of(plan: PlanRecord) -> CacheWish | None:
    """What the plan's cache was chosen by; None where it has none."""
    found = plan.details.get(KV_CACHE)
    return None if found is None else CacheWish.from_json(found["wish"])


def cache_simulation(study: Study, plan: PlanRecord) -> CacheSimulation | None:
    """What quantises the cache of the study's model as the plan says; None where nothing does."""
    formats = cache_formats(plan)
    if all(name == NONE for name in formats.values()):
        return None
    return CacheSimulation.calibrated(study.loaded().model, formats, stored_layers(study))


def exported_cache(study: Study, plan: PlanRecord) -> ExportedCache | None:
    """The plan's cache as a checkpoint holds it; None where the plan has no say in that."""
    formats = cache_formats(plan)
    return ExportedCache(stored_layers(study), formats) if formats else None


def refuse_unwritable_cache(plan: PlanRecord, container: str) -> None:
    """Refuse to export a plan whose cache the container cannot hold.

    Args:
        container: what `Study.export` takes.
    Raises:
        ExportError: says why.
    """
    formats = cache_formats(plan)
    if all(name == NONE for name in formats.values()) or container == _ENGINE_CHECKPOINT:
        return
    known = {entry.value: entry for entry in Container}
    reason: str | None = (
        f"autoq writes no format of the key/value cache into {container}; export to modelopt, "
        "compressed-tensors or tensorrt-llm, or search without --kv-formats"
    )
    if container in known:
        reason = cache_refusal(formats.values(), known[container])
    if reason is not None:
        raise ExportError(reason)


def cache_summary(study: Study, plan: PlanRecord) -> dict[str, Any] | None:
    """The plan's cache as plain data, with every layer's scores; None where it has none."""
    found = plan.details.get(KV_CACHE)
    if found is None:
        return None
    layers = stored_layers(study)
    table = _scores(study, layers)
    scores, errors = table.scores(), table.standard_errors()
    rows = [
        {
            "name": layer.name,
            "format": found["formats"][layer.name],
            "elements": layer.elements,
            "key_amax": layer.key_amax,
            "value_amax": layer.value_amax,
            "scores": _by_format(table, scores[row]),
            "standard_errors": _by_format(table, errors[row]),
        }
        for row, layer in enumerate(layers)
    ]
    wish = wish_of(plan)
    assert wish is not None  # the plan has a cache
    own = ("bits", "bytes_per_token", "predicted_loss", "predicted_loss_interval", "gap")
    return {
        **{key: found[key] for key in own},
        "budget": wish.bits,
        "scope": wish.scope,
        "offered": list(wish.formats),
        "layers": rows,
    }


def _by_format(table: SensitivityTable, values: Any) -> dict[str, float | None]:
    pairs = zip(table.formats, values, strict=True)
    return {fmt: float(value) if np.isfinite(value) else None for fmt, value in pairs}
