"""Measuring what was searched or exported against the original, on tokens never calibrated on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoq.api.config import ScoringConfig
from autoq.api.evaluating._folder import (
    WantedOfFolder,
    about_data,
    check_can_measure,
    evaluate_folder,
    plain_fidelity,
)
from autoq.api.evaluating.metrics import plan_metrics, wanted_metrics
from autoq.api.evaluating.tasks import is_model_folder, opened_plan, study_tasks
from autoq.api.measured import noise_floor_on, with_interval
from autoq.api.measuring import held_out_tokens, measure_plan
from autoq.api.opening import DEFAULT_STORE
from autoq.api.study import Study
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import Subject
from autoq.evaluators.cache import DEFAULT_BYTES, LogitsCache
from autoq.progress import Progress, SilentProgress
from autoq.studies import StudyStore

HELD_OUT = "held_out"
"""Data source: what was kept apart from calibration."""


def evaluate(
    target: str | Path,
    *,
    reference: str | Path | None = None,
    data: str | None = None,
    store: str | StudyStore = DEFAULT_STORE,
    effective_bits: float | None = None,
    sequences: int = 32,
    sequence_length: int | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    task_batch_size: int | str = "auto",
    metrics: Sequence[str] = (),
    cache: str | Path | None = None,
    cache_gb: float = DEFAULT_BYTES / 1e9,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint folder, or a study's plan, against the original model.

    Args:
        target: an exported checkpoint's folder, the name of a study, or, for tasks alone, an
            original model's folder.
        reference: the original model's folder; a study knows its own.
        data: a file, a `datasets` name, or "held_out" (also None): the held-out part of the
            study's calibration data, for checkpoints that of the bundled text.
        effective_bits: which plan of a study; None is its last.
        sequences: how many to measure on.
        sequence_length: tokens in each; None is 512, or what the study was searched with.
        trust_remote_code: run Python code that the original model's folder brings.
        tasks: of lm-eval, bundled ones, or YAML files. A folder's tasks need no reference, but
            stand beside its figures where there is one.
        limit: examples of each task; None is all.
        task_batch_size: sequences of tasks at once, or "auto".
        metrics: further ones by name; `autoq.evaluators.known_metrics` lists them.
        cache: a folder for the original's outputs, so that the next checkpoint does not run it
            again; not for studies, which measure all their plans in one go.
        cache_gb: bound on that folder in 10^9 bytes. Where the outputs do not fit in full, only
            the likeliest tokens of each are kept, and the KL divergence is a lower bound: then
            "kl_lower_bound" says how many tokens.
    Returns:
        Metrics by name with value and 95 % interval, and what they were measured on; of a study
        also the noise floor on those tokens. Tasks that ran are in "tasks", and why others did not
        in "task_failures".
    Raises:
        InputError: something that was given breaks a rule.
    """
    progress = progress or SilentProgress()
    source = None if data in (None, HELD_OUT) else data
    wanted = wanted_metrics(metrics)
    if not is_model_folder(target):
        if cache is not None:
            raise InputError(f"study {target} keeps no outputs on disk; leave out --cache")
        if (sequence_length, dtype, device) != (None, "auto", "auto"):
            raise InputError(
                f"study {target} is measured as it was searched; leave out --sequence-length, "
                "--dtype and --device, or measure its exported checkpoint"
            )
        study, plan = opened_plan(
            str(target), store, effective_bits=effective_bits, trust_remote_code=trust_remote_code
        )
        loaded = study.loaded()
        subject = Subject(model=loaded.model, tokenizer=loaded.tokenizer_if_any)
        check_can_measure(subject, wanted, tasks)
        tokens = held_out_tokens(study, source, sequences=sequences)
        fidelity = measure_plan(study, plan, tokens, data=source, progress=progress)
        found = {
            "target": study.name,
            "plan": plan.label,
            "reference": study.record.model_path,
            **about_data(tokens),
            **plain_fidelity(fidelity),
            "noise_floor": _floor(study, tokens),
        }
        if wanted:
            more = plan_metrics(study, plan, tokens, wanted, data=source, progress=progress)
            found["metrics"].update(more)
        if tasks:
            found |= study_tasks(
                study, plan, tasks, limit=limit, batch_size=task_batch_size, progress=progress
            )
        return found
    return evaluate_folder(
        Path(target),
        None if reference is None else Path(reference),
        ScoringConfig(
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        WantedOfFolder(
            source,
            sequences,
            sequence_length,
            wanted,
            tuple(tasks),
            limit,
            task_batch_size,
            None if cache is None else LogitsCache(Path(cache), max_bytes=_bytes(cache_gb)),
        ),
        progress,
    )


def _bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < math.inf:
        raise InputError(f"cache_gb must be above 0, got {gigabytes:g}")
    return int(gigabytes * 1e9)


def _floor(study: Study, tokens: TokenData) -> dict[str, float | None] | None:
    found = noise_floor_on(study, tokens.sha256)
    return None if found is None else with_interval(found)
