"""A drop-in for the call that users of NVIDIA ModelOpt's `auto_quantize` know.

It differs where that call surprises: the data is read once, so a generator will do; scores are
solved exactly whatever their scale; and the returned state solves another budget at once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.api.costing import constrained_costs
from autoq.api.exports.auto_quantize import export_state
from autoq.api.scoring import BatchesInMemory, ScoringPass
from autoq.api.streamed.block_caches import cache_format, exported
from autoq.api.task import PROBE_TOKENS, sampled_loss
from autoq.calibration import calibrate
from autoq.calibration.kv_cache import calibrate_cache
from autoq.errors import DataError, InputError
from autoq.export import ExportedCache, ExportResult
from autoq.formats import FORMATS, NONE, FormatName, portable_formats
from autoq.layers import LayerCalibration
from autoq.layers.kv_cache import CacheSimulation, cached_layers
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import ModelMap, SlotName
from autoq.models.discovery import discover
from autoq.models.forward import forward_logits
from autoq.models.loading import use_eager_experts
from autoq.models.weights import check_finite
from autoq.search import Plan, SensitivityTable, check_budget, solve
from autoq.search.estimators import DEFAULT_ESTIMATOR, ESTIMATORS, make_estimator
from autoq.search.sensitivity import BatchLoss

PEER_FORMAT_NAMES = {
    "FP8_DEFAULT_CFG": "fp8",
    "NVFP4_DEFAULT_CFG": "nvfp4",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "nvfp4_svdquant",
    "W4A8_AWQ_BETA_CFG": "w4a8_awq",
    "INT4_AWQ_CFG": "int4_awq",
    "INT8_SMOOTHQUANT_CFG": "int8_sq",
    "INT8_WEIGHT_ONLY_CFG": "int8_wo",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8_pc_pt",
    "MXFP8_DEFAULT_CFG": "mxfp8",
    "MXFP4_DEFAULT_CFG": "mxfp4",
}
"""ModelOpt's names of the formats that autoq has."""

DEFAULT_EFFECTIVE_BITS = 4.8


@dataclass(frozen=True, slots=True)
class AutoQuantizeState:
    """What `auto_quantize` found; pass it back to solve for another budget without scoring."""

    model_map: ModelMap
    formats: tuple[FormatName, ...]
    calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration]
    sensitivity: SensitivityTable
    storage_dtype: torch.dtype
    plan: Plan
    simulated: SimulatedModel
    kv_cache: ExportedCache | None = None  # None: the key/value cache is left alone

    def solve(self, effective_bits: float) -> Plan:
        """The best plan within another budget; the model is left as it is."""
        costs = constrained_costs(self.model_map, self.formats, (), {})
        return solve(self.sensitivity, costs, effective_bits)

    def export(
        self,
        destination: str | Path,
        *,
        source: str | Path | None = None,
        overwrite: bool = False,
    ) -> ExportResult:
        """Write the plan in force, and the cache's scales, as a ModelOpt checkpoint; read it back.

        Args:
            destination: the folder to create.
            source: the model's folder, from which tokenizer and generation files are copied.
            overwrite: replace a checkpoint that is there.
        Raises:
            ExportError: the container cannot express it, or the folder cannot be written.
            VerificationError: what was written does not read back bit for bit.
        """
        return export_state(self, Path(destination), source, overwrite=overwrite)

    @property
    def assignment(self) -> dict[str, str]:
        """Module -> format of the plan in force."""
        formats = slot_formats_of(self.model_map, self.plan.assignment)
        return {str(slot): str(fmt) for slot, fmt in formats.items()}


def auto_quantize(
    model: nn.Module,
    constraints: Mapping[str, float] | None = None,
    quantization_formats: Sequence[str] | None = None,
    data_loader: Iterable[Any] | None = None,
    forward_step: Callable[[nn.Module, Any], Any] | None = None,
    loss_func: Callable[[Any, Any], Tensor] | None = None,
    disabled_layers: Sequence[str] | None = None,
    num_calib_steps: int = 512,
    num_score_steps: int = 128,
    verbose: bool = False,
    *,
    auto_quantize_bits: float | None = None,
    kv_cache_format: str | None = None,
    state: AutoQuantizeState | None = None,
) -> tuple[nn.Module, AutoQuantizeState]:
    """Quantise a model's linears in place, each in the format that the search gives it.

    Args:
        model: in memory; returned with its linears quantised.
        constraints: {"effective_bits": mean bits per weight}; "auto_quantize_bits" is the same.
        quantization_formats: autoq's names, or ModelOpt's (`NVFP4_DEFAULT_CFG`, ...).
        data_loader: batches; read once, at most max(num_calib_steps, num_score_steps) of them.
            Token ids [sequences, tokens], or a mapping with "input_ids", unless `forward_step`
            says otherwise.
        forward_step: (model, batch) -> output; None runs the model on the token ids.
        loss_func: (output, batch) -> scalar loss; None scores against the model's own output
            distribution, which needs no labels.
        disabled_layers: globs of layers to leave alone.
        num_calib_steps: batches to calibrate on.
        num_score_steps: batches to score on.
        verbose: print the plan.
        auto_quantize_bits: older spelling of the constraint.
        kv_cache_format: of the key/value cache in all layers, "fp8" or "nvfp4", calibrated on the
            same batches; None leaves it alone. With `state` it is the state's.
        state: of an earlier call for this model; nothing is calibrated or scored again.
    Returns:
        The model and the state.
    Raises:
        InputError: something that was given breaks a rule.
        ModelError: the model keeps no cache of keys and values.
    """
    kv_format = cache_format(kv_cache_format, Container.MODELOPT, argument="kv_cache_format")
    effective_bits = _budget(constraints, auto_quantize_bits)
    if state is None:
        state = _score(
            model,
            effective_bits,
            _format_names(quantization_formats),
            _materialise(data_loader, max(num_calib_steps, num_score_steps)),
            forward_step,
            loss_func,
            tuple(disabled_layers or ()),
            num_calib_steps,
            num_score_steps,
            kv_format,
        )
    else:
        _refuse_other_cache(state, kv_cache_format, kv_format)
        state = _resolved(state, model, effective_bits)
    if verbose:
        _print_plan(state)
    return model, state


def _budget(constraints: Mapping[str, float] | None, older: float | None) -> float:
    given = dict(constraints or {})
    if older is not None:
        given["auto_quantize_bits"] = older
    bits = given.pop("effective_bits", None)
    older_bits = given.pop("auto_quantize_bits", None)
    if given:
        raise InputError(
            f"constraints know effective_bits only, got {', '.join(sorted(given))}; drop the others"
        )
    if bits is not None and older_bits is not None and bits != older_bits:
        raise InputError(
            f"effective_bits is {bits:g} and auto_quantize_bits is {older_bits:g}; give one"
        )
    chosen = bits if bits is not None else older_bits
    return DEFAULT_EFFECTIVE_BITS if chosen is None else float(chosen)


def _format_names(names: Sequence[str] | None) -> tuple[FormatName, ...]:
    if names is None:
        return portable_formats()
    for name in names:
        if not isinstance(name, str):
            raise InputError(
                f"quantization_formats are names, got a {type(name).__name__}; known: "
                f"{', '.join([*FORMATS, *PEER_FORMAT_NAMES])}"
            )
    return tuple(FORMATS[PEER_FORMAT_NAMES.get(name, name)].name for name in names)


def _materialise(data_loader: Iterable[Any] | None, steps: int) -> list[Any]:
    batches = list(itertools.islice(data_loader or (), steps))
    if not batches:
        raise DataError("data_loader gave no batch; it must give at least one")
    return batches


def _score(
    model: nn.Module,
    effective_bits: float,
    formats: tuple[FormatName, ...],
    batches: Sequence[Any],
    forward_step: Callable[[nn.Module, Any], Any] | None,
    loss_func: Callable[[Any, Any], Tensor] | None,
    disabled_layers: tuple[str, ...],
    calibration_steps: int,
    score_steps: int,
    kv_format: FormatName,
) -> AutoQuantizeState:
    if loss_func is not None and forward_step is None:
        raise InputError("loss_func needs forward_step, which makes the output that it is given")
    model.eval()
    use_eager_experts(model)
    storage_dtype = next(model.parameters()).dtype
    model_map = discover(model, exclude=disabled_layers)
    check_budget(constrained_costs(model_map, formats, (), {}), effective_bits)
    check_finite(model, model_map.slots.values())
    run = partial(forward_step or _run_on_ids, model)
    calibration = calibrate(
        model,
        model_map,
        formats,
        batches[:calibration_steps],
        run,
        run_small=partial(_small_output, run, batches[0]),
        container=Container.MODELOPT,
        scale_dtype=storage_dtype,
    )
    small = partial(_small_output, run, batches[0])
    cache = _calibrated_cache(model, kv_format, batches[:calibration_steps], run, small)
    scorer, contributions = ScoringPass(
        make=partial(
            make_estimator,
            model=model,
            model_map=model_map,
            formats=formats,
            calibration=calibration,
            container=Container.MODELOPT,
            scale_dtype=storage_dtype,
        ),
        batches=len(batches[:score_steps]),
        loss=lambda index: _batch_loss(model, run, loss_func, index, batches[index]),
        store=BatchesInMemory(),
        advance=lambda steps=1: None,
        note=_warn,
        exclusion="disabled_layers",
    ).run(DEFAULT_ESTIMATOR)
    sensitivity = SensitivityTable(
        groups=tuple(group.name for group in model_map.groups),
        formats=scorer.formats,
        contributions=contributions,
        unit="relative" if loss_func else "nats_per_token",
        estimator=scorer.name,
    )
    costs = constrained_costs(model_map, formats, (), {})
    plan = solve(sensitivity, costs, effective_bits)
    simulated = SimulatedModel(
        model,
        model_map.slots,
        slot_formats_of(model_map, plan.assignment),
        calibration,
        container=Container.MODELOPT,
        scale_dtype=storage_dtype,
    )
    if cache is not None:
        simulated.set_kv_cache(CacheSimulation.calibrated(model, cache.formats, cache.layers))
    return AutoQuantizeState(
        model_map, formats, calibration, sensitivity, storage_dtype, plan, simulated, cache
    )


def _calibrated_cache(
    model: nn.Module,
    fmt: FormatName,
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    run_small: Callable[[], Any],
) -> ExportedCache | None:
    if fmt == NONE:
        return None
    with torch.no_grad():
        layers = cached_layers(model, run_small)
    return exported(calibrate_cache(model, layers, batches, run), fmt, argument="kv_cache_format")


def _refuse_other_cache(state: AutoQuantizeState, given: str | None, fmt: FormatName) -> None:
    """
    Raises:
        InputError: the state's cache has another format.
    """
    own = NONE if state.kv_cache is None else state.kv_cache.format
    if given is not None and fmt != own:
        raise InputError(
            f"kv_cache_format is that of the state, {own}, and {given} was given; calibrate it by a "
            "call without state"
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _resolved(
    state: AutoQuantizeState, model: nn.Module, effective_bits: float
) -> AutoQuantizeState:
    """The state with another budget's plan in force."""
    if state.simulated.model is not model:
        raise InputError(
            "state belongs to another model object; pass the model that auto_quantize returned "
            "with it"
        )
    plan = state.solve(effective_bits)
    state.simulated.apply(slot_formats_of(state.model_map, plan.assignment))
    return replace(state, plan=plan)


def _token_ids(batch: Any) -> Tensor:
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise DataError(
            "without forward_step a batch must be token ids [sequences, tokens] or a mapping with "
            f"input_ids of that shape, got {type(batch).__name__}"
        )
    return ids


def _run_on_ids(model: nn.Module, batch: Any) -> Tensor:
    return forward_logits(model, _token_ids(batch))


def _small_output(run: Callable[[Any], Any], batch: Any) -> Tensor:
    """The output on a small input; of a user's forward step, on the first batch as it is."""
    if isinstance(batch, Tensor):
        batch = batch[:1, :PROBE_TOKENS]
    return _output_tensor(run(batch))


def _output_tensor(output: Any) -> Tensor:
    tensor = getattr(output, "logits", output)
    if isinstance(tensor, tuple):
        tensor = tensor[0]
    if not isinstance(tensor, Tensor):
        raise InputError(
            "forward_step must return a tensor or an output with logits, got "
            f"{type(output).__name__}"
        )
    return tensor


def _batch_loss(
    model: nn.Module,
    run: Callable[[Any], Any],
    loss_func: Callable[[Any, Any], Tensor] | None,
    index: int,
    batch: Any,
) -> BatchLoss:
    output = run(batch)
    if loss_func is not None:
        sequences, tokens = _batch_shape(batch)
        return BatchLoss(loss_func(output, batch), sequences, tokens)
    tensor = _output_tensor(output)
    return sampled_loss(model, tensor, index, ESTIMATORS[DEFAULT_ESTIMATOR].labels)


def _batch_shape(batch: Any) -> tuple[int, int]:
    """(sequences, tokens) of the first tensor with two dimensions in the batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    entries = [batch] if isinstance(batch, Tensor) else list(values)
    for entry in entries:
        if isinstance(entry, Tensor) and entry.dim() >= 2:
            return entry.shape[0], entry.shape[1]
    return 1, 1


def _print_plan(state: AutoQuantizeState) -> None:
    plan = state.plan
    for group in state.model_map.groups:
        print(f"{plan.assignment[group.name]:>10}  {group.name}")
    print(
        f"effective bits {plan.effective_bits:.4f} of {plan.budget_bits:g} "
        f"(stored {plan.stored_bits_per_weight:.4f}, as ModelOpt counts "
        f"{plan.peer_effective_bits:.4f}); predicted loss {plan.predicted_loss:.3e}, "
        f"gap {plan.gap:.1e}"
    )
