"""Measuring a checkpoint's folder, beside its original where there is one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq.api.config import ScoringConfig
from autoq.api.evaluating.metrics import (
    cached_fidelity,
    cached_outputs,
    check_architecture,
    check_metrics,
    folder_metrics,
    quantised_model,
)
from autoq.api.evaluating.tasks import folder_subject, folder_tasks
from autoq.api.measuring import advancing
from autoq.api.task import LoadedModel, load, load_data, output_properties, token_batches
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import Estimate, Fidelity, Subject, measure_fidelity
from autoq.evaluators.cache import LogitsCache
from autoq.evaluators.tasks import check_can_run
from autoq.memory import give_back_freed_memory
from autoq.models.forward import forward_logits
from autoq.progress import Progress


@dataclass(frozen=True, slots=True)
class WantedOfFolder:
    """What is measured of a folder, and on what."""

    data: str | None
    sequences: int
    sequence_length: int | None
    metrics: tuple[str, ...]
    tasks: tuple[str, ...]
    limit: int | None
    task_batch_size: int | str
    cache: LogitsCache | None


def evaluate_folder(
    path: Path,
    reference: Path | None,
    config: ScoringConfig,
    wanted: WantedOfFolder,
    progress: Progress,
) -> dict[str, Any]:
    """As `autoq.api.evaluating.evaluation.evaluate`, of a folder.

    There are two models in memory at most: the original, and the checkpoint packed, for metrics and
    tasks, or with dequantised weights, for its fidelity.
    """
    if reference is None and (wanted.metrics or not wanted.tasks):
        raise InputError(
            f"measuring the checkpoint {path} needs the original model; name its folder "
            "(--reference)"
        )
    found: dict[str, Any] = {"target": str(path)}
    subject: Subject | None = None
    if wanted.metrics or wanted.tasks:
        subject = folder_subject(
            path,
            device=config.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        check_can_measure(subject, wanted.metrics, wanted.tasks)
    if reference is None:
        assert subject is not None  # there are tasks
        return found | _tasks(subject, None, wanted, progress)
    original = load(config, reference)
    beside = _Beside(path, original, config, wanted, progress)
    metrics: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    if subject is not None:
        metrics, tasks = beside.as_it_runs(subject)
        subject = None  # before the same checkpoint is in memory once more, dequantised
        gc.collect()
        give_back_freed_memory()
    found |= {"reference": str(reference), **beside.fidelity()}
    found["metrics"].update(metrics)
    return found | tasks


def _tasks(
    subject: Subject, original: LoadedModel | None, wanted: WantedOfFolder, progress: Progress
) -> dict[str, Any]:
    if not wanted.tasks:
        return {}
    return folder_tasks(
        subject,
        None
        if original is None
        else Subject(model=original.model, tokenizer=original.tokenizer_if_any),
        wanted.tasks,
        limit=wanted.limit,
        batch_size=wanted.task_batch_size,
        progress=progress,
    )


class _Beside:
    """A checkpoint beside its original, on the same tokens; never with more than two models."""

    def __init__(
        self,
        path: Path,
        original: LoadedModel,
        config: ScoringConfig,
        wanted: WantedOfFolder,
        progress: Progress,
    ) -> None:
        self._path, self._original, self._wanted = path, original, wanted
        self._progress = progress
        self._tokens = load_data(
            original,
            wanted.data,
            sequences=wanted.sequences,
            sequence_length=wanted.sequence_length or config.sequence_length,
            split="held_out",
            seed=config.seed,
        )
        self._batches = token_batches(self._tokens, config.batch_size, original.device)
        self._outputs = (
            None if wanted.cache is None else cached_outputs(wanted.cache, original, self._batches)
        )

    def as_it_runs(self, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
        """Further metrics, and tasks, of the packed checkpoint.

        Raises:
            InputError: it is of another architecture than the original.
        """
        check_architecture(self._path, subject.model, self._original)
        metrics: dict[str, Any] = {}
        if self._wanted.metrics:
            metrics = folder_metrics(
                subject,
                self._original,
                self._batches,
                self._wanted.metrics,
                self._progress,
                outputs=self._outputs,
            )
        return metrics, _tasks(subject, self._original, self._wanted, self._progress)

    def fidelity(self) -> dict[str, Any]:
        """What is always measured, of the checkpoint with dequantised weights."""
        return {**about_data(self._tokens), **self._fidelity()}

    def _fidelity(self) -> dict[str, Any]:
        if self._outputs is not None:
            return cached_fidelity(
                self._path, self._original, self._outputs, self._batches, self._progress
            )
        with self._progress.task("measuring", len(self._batches)) as advance, torch.no_grad():
            pairs = _checkpoint_pairs(self._path, self._original, self._batches)
            return plain_fidelity(
                measure_fidelity(
                    advancing(pairs, advance), **output_properties(self._original.model)
                )
            )


def _checkpoint_pairs(
    path: Path, original: LoadedModel, batches: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    quantised = quantised_model(path, original)
    forward = partial(forward_logits, original.model)
    for ids in batches:
        yield ids, forward(ids), forward_logits(quantised, ids)


def check_can_measure(subject: Subject, metrics: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse at once what would fail after minutes of measuring something else."""
    check_metrics(subject, metrics)
    if tasks:
        check_can_run(subject)


def about_data(tokens: TokenData) -> dict[str, str]:
    """Which tokens, as plain data."""
    return {"data": tokens.description, "data_sha256": tokens.sha256}


def plain_fidelity(fidelity: Fidelity) -> dict[str, Any]:
    """What is always measured, as plain data."""
    return {
        "tokens": fidelity.tokens,
        "metrics": {
            "kl_divergence": _interval(fidelity.kl_divergence),
            "top1_agreement": _interval(fidelity.top1_agreement),
            "perplexity": fidelity.perplexity,
            "reference_perplexity": fidelity.reference_perplexity,
        },
    }


def _interval(estimate: Estimate | None) -> dict[str, float] | None:
    if estimate is None:
        return None
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
