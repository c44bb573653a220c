"""Further metrics of checkpoints and plans by name, from the registered evaluators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from autoq.api.measured import OTHER_DATA, PER_SEQUENCE
from autoq.api.task import LoadedModel, token_batches
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import Estimate, Reference, Subject, known_metrics, measure_metrics
from autoq.evaluators.cache import CachedOutputs, LogitsCache
from autoq.evaluators.metrics import check_can_have, wanted
from autoq.layers.simulate import SimulatedModel
from autoq.models.forward import forward_logits, is_causal, output_kind
from autoq.progress import Progress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study


class _Shape(TypedDict):
    width: int
    dtype: torch.dtype


def wanted_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Full names of metrics; refuses tasks, which are named otherwise.

    Raises:
        InputError: a name is unknown, or that of a task.
    """
    found = wanted(names)
    if found.tasks:
        raise InputError(
            f"{', '.join(found.tasks)} must be a metric, and is an evaluation task; name it with "
            "--tasks"
        )
    return found.metrics


def check_metrics(subject: Subject, names: Sequence[str]) -> None:
    """Refuse what such a model cannot have, before anything is measured.

    Raises:
        InputError: names the evaluator and what is missing.
    """
    check_can_have(wanted(names), subject)


def plan_metrics(
    study: Study,
    plan: PlanRecord,
    tokens: TokenData,
    names: Sequence[str],
    *,
    data: str | None,
    progress: Progress,
) -> dict[str, dict[str, float | None]]:
    """Measure metrics of a study's plan, simulated in its own model, and store them."""
    loaded = study.loaded()
    batches = token_batches(tokens, study.config.batch_size, loaded.device)
    simulated = study.simulate(plan)
    try:
        subject = Subject(model=simulated.model, tokenizer=loaded.tokenizer_if_any)
        reference = Reference(batches, lambda: _paused(simulated))
        found = _measure(subject, reference, names, progress)
    finally:
        simulated.restore()
    other_data: dict[str, Any] = {} if data is None else {OTHER_DATA: data}
    study.store.add_measurements(
        study.id,
        {name: (estimate.value, _interval(estimate)) for name, estimate in found.items()},
        plan_id=plan.id,
        label=plan.label,
        details=other_data,
        details_by_metric={
            name: {PER_SEQUENCE: list(estimate.per_sequence)} for name, estimate in found.items()
        },
        tokens=int(tokens.ids.size),
        data_sha256=tokens.sha256,
    )
    return {name: _plain(estimate) for name, estimate in found.items()}


@contextmanager
def _paused(simulated: SimulatedModel) -> Iterator[nn.Module]:
    with simulated.paused():
        yield simulated.model


def folder_metrics(
    subject: Subject,
    original: LoadedModel,
    batches: Sequence[Tensor],
    names: Sequence[str],
    progress: Progress,
    *,
    outputs: CachedOutputs | None = None,
) -> dict[str, dict[str, float | None]]:
    """Measure metrics of a checkpoint, packed as it runs, beside the original.

    Args:
        outputs: the original's, if they are kept on disk.
    """
    reference = Reference(batches, lambda: nullcontext(original.model), outputs=outputs)
    found = _measure(subject, reference, names, progress)
    return {name: _plain(estimate) for name, estimate in found.items()}


def cached_outputs(
    cache: LogitsCache, original: LoadedModel, batches: Sequence[Tensor]
) -> CachedOutputs:
    """The original's outputs on some tokens, as the cache keeps them.

    Raises:
        InputError: they do not fit.
    """
    model: Any = original.model
    if output_kind(model) != "logits":
        raise InputError(
            f"outputs of {type(model).__name__} are hidden states, which are not kept on disk; "
            "leave out --cache"
        )
    return cache.outputs(batches, fingerprint=original.fingerprint, **_shape_of(model, batches[0]))


def outputs_in_full(
    cache: LogitsCache, original: LoadedModel, batches: Sequence[Tensor]
) -> CachedOutputs | None:
    """The original's outputs on some tokens to the bit; None where they do not fit so.

    Args:
        original: as it is, with its own weights.
    Raises:
        InputError: the folder cannot be written to.
    """
    about = _shape_of(original.model, batches[0])
    return cache.outputs_in_full(batches, fingerprint=original.fingerprint, **about)


def _shape_of(model: nn.Module, ids: Tensor) -> _Shape:
    """Found by running the model on one token: heads may be wider than embeddings."""
    with torch.no_grad():
        output = forward_logits(model, ids[:1, :1])
    return {"width": output.shape[-1], "dtype": output.dtype}


def cached_fidelity(
    path: Path,
    original: LoadedModel,
    outputs: CachedOutputs,
    batches: Sequence[Tensor],
    progress: Progress,
) -> dict[str, Any]:
    """What `evaluate` always measures of a checkpoint, beside outputs that are kept on disk."""
    subject = Subject(model=quantised_model(path, original))
    reference = Reference(batches, lambda: nullcontext(original.model), outputs=outputs)
    names = ["kl_divergence", "top1_agreement"]
    names += ["perplexity", "reference_perplexity"] if is_causal(original.model) else []
    with progress.task("measuring", len(batches)) as advance:
        found = measure_metrics(subject, reference, names, advance=advance)
    return {
        "tokens": sum(batch.numel() for batch in batches),
        "kl_lower_bound": None if outputs.is_exact else {"kept_tokens": outputs.kept},
        "metrics": {
            name: found[name].value if name.endswith("perplexity") else _plain(found[name])
            for name in names
            if name in found
        },
    }


def quantised_model(path: Path, original: LoadedModel) -> nn.Module:
    """The checkpoint with dequantised weights, in the original's dtype and on its device.

    Raises:
        InputError: it is of another architecture.
    """
    from autoq.export import simulated_checkpoint

    dtype = next(original.model.parameters()).dtype
    quantised = simulated_checkpoint(path, dtype=dtype).model.to(original.device)
    check_architecture(path, quantised, original)
    return quantised


def check_architecture(path: Path, model: nn.Module, original: LoadedModel) -> None:
    """Refuse to compare a checkpoint with what it was not made from.

    Raises:
        InputError: they are not of one class.
    """
    if type(model) is not type(original.model):
        raise InputError(
            f"the checkpoint {path} is a {type(model).__name__} and the reference a "
            f"{type(original.model).__name__}; name the folder of the model it was made from"
        )


def _measure(
    subject: Subject, reference: Reference, names: Sequence[str], progress: Progress
) -> dict[str, Estimate]:
    with progress.task(f"measuring {', '.join(names)}", len(reference.batches)) as advance:
        found = measure_metrics(subject, reference, names, advance=advance)
    # What else the same evaluators gave was not asked for.
    known = known_metrics()
    return {name: found[name] for name in names if name in found and name in known}


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return (estimate.low, estimate.high) if known else None


def _plain(estimate: Estimate) -> dict[str, float | None]:
    low, high = _interval(estimate) or (None, None)
    return {"value": estimate.value, "low": low, "high": high}
