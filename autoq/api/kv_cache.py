"""The key/value cache of a study: what may be wished for, and scores that all wishes share.

The choice is separate from that of the weights: scores, budget and solution of its own; see
`autoq.api.cache_plans`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from autoq.api._cache_batches import CacheBatches
from autoq.api.cache_plans import DEFAULT_BITS, KV_CACHE, CacheWish, cache_formats, stored_layers
from autoq.api.task import LoadedModel, own_distribution_task
from autoq.calibration.kv_cache import calibrate_cache
from autoq.data import TokenData
from autoq.errors import ExportError, InputError
from autoq.export import ExportedCache, cache_refusal
from autoq.formats import NONE, Container, FormatName, Target
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal
from autoq.formats.kv_cache_support import kv_cache_reason
from autoq.layers.kv_cache import CacheSimulation, cached_layers
from autoq.progress import Progress, in_turn
from autoq.search.cache_choice import CacheScope, check_cache_formats
from autoq.search.estimator_names import DEFAULT_ESTIMATOR
from autoq.search.kv_cache import CacheScorer
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

_ENGINE_CHECKPOINT = "tensorrt-llm"  # what `export` calls it; it refuses caches by itself

_SCOPES: tuple[CacheScope, ...] = ("model", "layer")


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
