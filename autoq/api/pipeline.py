"""The main job: from a model and a budget to a stored, measured, exported plan.

Every stage's result is in the store before the next begins, so a search that is killed at any
point and started again with the same arguments continues, and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from autoq.api.budgets import Budgets, budgets_or_default, gpu_of
from autoq.api.cache_plans import plan_of_weights, with_cache
from autoq.api.config import ScoringConfig, parse_calibration
from autoq.api.costing import SIZES
from autoq.api.distribution import Crew, Helpers, at_hand, crew_of
from autoq.api.exports.exporting import export_plan
from autoq.api.exports.streamed import export_plan_streamed
from autoq.api.kv_cache import cache_wish, run_cache_scores
from autoq.api.opening import DEFAULT_STORE
from autoq.api.quality import smallest_that_keeps
from autoq.api.refinement.options import options_of_search
from autoq.api.refinement.refining import refine_study
from autoq.api.remarks import (
    note_narrow_formats,
)
from autoq.api.renewal import RenewingProgress
from autoq.api.search_setup import Asked, Ready, check_asked, prepare
from autoq.api.stages import (
    is_done,
    run_calibration,
    run_discovery,
    run_measure,
    run_sensitivity,
    run_sizes,
    run_solve,
)
from autoq.api.streamed.streaming import (
    compiling_nothing,
)
from autoq.api.study import Study
from autoq.api.study_tables import CALIBRATION, DISCOVERY, SENSITIVITY
from autoq.api.targeting import offers
from autoq.formats import parse_target
from autoq.progress import Progress, SilentProgress
from autoq.search import CostTable, Plan, SensitivityTable, solve
from autoq.search.estimators import DEFAULT_ESTIMATOR
from autoq.studies import PlanRecord, StudyStore, WorkStatus


def search(
    model: str | Path | nn.Module,
    *,
    effective_bits: float | None = None,
    max_gb: float | None = None,
    max_active_bits: float | None = None,
    max_latency_ms: float | None = None,
    max_kl: float | None = None,
    gpu: str | None = None,
    latency_table: str | Path | None = None,
    latency_tokens: int = 1,
    formats: Sequence[str] | None = None,
    kv_formats: Sequence[str] | None = None,
    kv_bits: float | None = None,
    kv_scope: str | None = None,
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
    max_memory: str | int | None = None,
    row_fraction: float = 1.0,
    calibration: str = "best",
    estimator: str | None = None,
    draws: int | None = None,
    confidence: float | None = None,
    seed: int = 0,
    store: str | StudyStore = DEFAULT_STORE,
    name: str | None = None,
    export: str | Path | None = None,
    overwrite: bool = False,
    measure: bool = True,
    refine: int = 0,
    refine_options: Mapping[str, Any] | None = None,
    workers: int = 1,
    devices: int | None = None,
    ray: str | None = None,
    ranks: bool = False,
    compare_uniform: bool = False,
    trust_remote_code: bool = False,
    wait_seconds: float = 0.0,
    progress: Progress | None = None,
) -> Study:
    """Search, measure and, if asked, export a model. Continues a search that was interrupted.

    Args:
        model: a folder with a Hugging Face model, or a model in memory.
        effective_bits: budget: mean bits per searched weight, codes and block scales. Where no
            budget is given it is 4.8; several hold at once.
        max_gb: budget: weights of the whole checkpoint in 10^9 bytes, layers that are not searched
            included.
        max_active_bits: budget: mean bits per weight that a token touches; for mixtures of
            experts, by the routing of the calibration data.
        max_latency_ms: budget: predicted time of the searched layers' products in one step, on
            `gpu` or by `latency_table`.
        max_kl: quality: the smallest model whose KL divergence to the original, in nats per token,
            is no more; measured on held-out data, or predicted without `measure`.
        gpu: whose latency is predicted, one of `autoq.search.hardware.GPUS`; where it is left out
            and latency is limited, that of `target`.
        latency_table: measured kernels, a file that `autoq kernels bench --json` wrote.
        latency_tokens: tokens of one step: one per sequence in decoding, all in prefill.
        formats: names; None is the portable set that every engine loads, or what `target` runs of
            the formats that are offered unasked.
        kv_formats: names of `autoq.formats.kv_cache.KV_CACHE_FORMATS` to choose the key/value cache's
            from; None leaves the cache alone.
        kv_bits: budget: mean bits per cached element, block scales counted; None is 8.
        kv_scope: "model", which None is, for one format that all layers share, as checkpoints state
            it, or "layer" for one each, which is measured and cannot be exported.
        rules: "pattern=format[,format]", binding the groups that match.
        include: globs of layers to search although they are left out by default.
        exclude: globs of layers to leave alone.
        calibration_data: a file, a `datasets` name, or None for the bundled text.
        calibration_sequences: how many sequences to calibrate and score on.
        sequence_length: tokens in each; fewer if the model has fewer positions.
        held_out_sequences: how many sequences, never calibrated on, to measure on.
        container: "modelopt" or "compressed-tensors", the checkpoint that is aimed at; None is
            the target's best, or modelopt where that holds the formats.
        target: "ENGINE:HARDWARE" where the checkpoint is to run, for example "vllm:h200"; None
            asks nothing of formats and container.
        max_memory: bound on the process's memory, in bytes or as "4GB": the model is never held,
            its blocks are read from the folder one by one, and what they give waits in memory or
            on the disk (where temporary files are, TMPDIR). Scores, plans and measurements are
            those of the model in memory, bit for bit. Without refinement, cache formats and a
            measured `max_kl`.
        row_fraction: share of the tokens that are scored, in (0, 1].
        calibration: "best": scales by the error that they leave, and 4-bit codes that make up for
            each other's errors (GPTQ); "scales": the nearest codes instead, of which none are stored; or
            "max" for scales from largest magnitudes only, as other tools have them (input scales
            of AWQ formats and of int8_sq are searched all the same). Or algorithms joined by "+",
            of which each format takes what it can, such as "percentile:99.9+awq+gptq"; those of
            `autoq.formats.ALGORITHMS`.
        estimator: name of the way to score, one of `autoq.search.estimators.ESTIMATORS`; None is
            the one that wins the benchmark.
        draws: of labels for every sequence; None is what the estimator likes.
        confidence: score until the plan stays within 2 % of the best in this share of resampled
            data, in (0, 1), or the data ends; None scores all of it. With `max_kl` all is scored.
        store: URL of the study store, or an open one.
        name: of the study; None makes one from the model and the configuration.
        export: folder for the checkpoint; None writes none.
        overwrite: replace the export folder if it exists.
        measure: measure the plan on held-out data.
        refine: plans to measure in order to improve the plan, 0 for none; `Study.refine` does the
            same later.
        refine_options: other fields of `autoq.api.refinement.refining.RefineOptions`, such as objective; where
            any is left out it has its default, except `held_out_sequences`, which is the search's.
        workers: processes that refine at the same time, this one included.
        devices: GPUs of this machine that score at the same time, or processes where it has none;
            the scores are the same, bit for bit. With `ray`: of the cluster.
        ray: address of a Ray cluster that scores, and measures trials, or "auto" for the one that
            this machine belongs to, or else one of this machine alone.
        ranks: this process is rank 0 of a launch, by torchrun for example, whose other ranks call
            `autoq.api.distribution.ranks.serve_rank` and score.
        compare_uniform: measure every format applied to all layers, too.
        wait_seconds: how long to wait for another process that works on the same study.
    Raises:
        InputError: something that was given breaks a rule; nothing that was stored is lost.
        StudyLockedError: another process works on the study.
    """
    progress = progress or SilentProgress()
    refining = options_of_search(refine, refine_options, held_out_sequences)
    place = None if target is None else parse_target(target)
    budgets = budgets_or_default(
        Budgets(
            effective_bits=effective_bits,
            max_gb=max_gb,
            max_active_bits=max_active_bits,
            max_latency_ms=max_latency_ms,
            max_kl=max_kl,
            gpu=gpu if place is None else gpu_of(place, gpu, latency_table, max_latency_ms),
            latency_table=latency_table,
            latency_tokens=latency_tokens,
        )
    )
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
        calibration=parse_calibration(calibration),
        estimator=estimator or DEFAULT_ESTIMATOR,
        draws=draws,
        confidence=confidence,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    is_stated = place is not None or container is not None or export is not None
    asked = Asked(
        model=model,
        config=config,
        offered=offered,
        place=place,
        budgets=budgets,
        rules=rules,
        wish=cache_wish(
            kv_formats,
            kv_bits,
            kv_scope,
            target=place,
            container=config.container if is_stated else None,
            max_kl=max_kl,
        ),
        refining=refining,
        max_memory=max_memory,
        store=store,
        name=name,
        held_out_sequences=held_out_sequences if measure else None,
        export=None if export is None else Path(export),
        overwrite=overwrite,
        compare_uniform=compare_uniform,
        workers=workers,
        ray=ray,
    )
    if place is None:
        note_narrow_formats(config, progress, named=container is not None)
    check_asked(asked)
    has_folder = not isinstance(model, nn.Module)
    crew = crew_of(devices, ray, ranks, device=device, has_folder=has_folder)
    ready = prepare(asked, progress, has_crew=crew is not None)
    lease_of = ready.store.lease(ready.study.id, wait_seconds=wait_seconds)
    with lease_of as lease, at_hand(crew), compiling_nothing(ready.loaded):
        renewing = RenewingProgress(progress, lease)
        _learn(asked, ready, crew, renewing)
        _decide(asked, ready, renewing)
        ready.store.set_status(ready.study.id, WorkStatus.DONE)
    return ready.study


def _learn(asked: Asked, ready: Ready, crew: Crew | None, progress: Progress) -> None:
    """The stages that every budget shares; what is in the store already is not done again."""
    study, loaded = ready.study, ready.loaded
    if not is_done(study, DISCOVERY):
        run_discovery(study, ready.discovered)
    if crew is not None and not is_done(study, SENSITIVITY):
        crew.prepare()
    if not is_done(study, CALIBRATION):
        run_calibration(study, loaded, ready.task, progress)
    if not is_done(study, SIZES):
        run_sizes(study, loaded)
    if not is_done(study, SENSITIVITY):
        budgets = asked.budgets
        solver = partial(_plan_for, study.costs(asked.rules, budgets), budgets)
        run_sensitivity(
            study,
            loaded,
            ready.task,
            progress,
            None if budgets.max_kl is not None else solver,
            None if crew is None else Helpers(crew, study, loaded, ready.data),
        )
    if asked.wish is not None:
        run_cache_scores(study, loaded, ready.data, progress)


def _decide(asked: Asked, ready: Ready, progress: Progress) -> None:
    """The plan for the budgets: chosen, measured, refined, exported."""
    study, held_out = ready.study, ready.held_out
    choose = partial(_choose, asked, ready, progress)
    plan = run_solve(study, choose, asked.rules, target=asked.place)
    if held_out is not None:
        run_measure(study, plan, held_out, asked.compare_uniform, progress)
    if asked.refining is not None:
        refine_study(
            study,
            plan_of_weights(study, plan),
            asked.refining,
            workers=asked.workers,
            ray=asked.ray,
            holds_lease=True,
            progress=progress,
        )
        if asked.wish is not None and held_out is not None:
            run_measure(study, study.refined(plan), held_out, False, progress)
    if asked.export is not None:
        whole = partial(export_plan, check_logits=True)
        write: Callable[..., Any] = export_plan_streamed if ready.loaded.stream else whole
        write(
            study,
            study.refined(plan),
            asked.export,
            ready.config.container,
            overwrite=asked.overwrite,
            progress=progress,
        )


def _plan_for(costs: CostTable, budgets: Budgets, sensitivity: SensitivityTable) -> Plan:
    """A plan within the budgets, proven to be nearer to the best than matters for confidence."""
    return solve(sensitivity, costs, budgets.limits, relative_gap=1e-3)


def _choose(asked: Asked, ready: Ready, progress: Progress) -> PlanRecord:
    """The plan for the budgets; a limit on quality is on the measured one where it can be."""
    study, budgets, rules, held_out = ready.study, asked.budgets, asked.rules, ready.held_out
    if asked.wish is not None:
        return with_cache(study, study.solve_for(budgets, rules), asked.wish)
    if budgets.max_kl is None or held_out is None:
        return study.solve_for(budgets, rules)
    return smallest_that_keeps(study, budgets, rules, held_out, progress)


def _absolute_if_file(source: str | None) -> str | None:
    """A study is measured later, from any folder: files are named in full."""
    return str(Path(source).resolve()) if source is not None and Path(source).exists() else source
