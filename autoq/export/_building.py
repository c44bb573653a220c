"""Building the model of a checkpoint, with everything in it that is stored as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autoq.errors import AutoqError, ExportError
from autoq.export._before_loading import before_loading
from autoq.export.reader import QuantizedCheckpoint
from autoq.models.loading import quiet_transformers

_STORAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_REMOTE_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


def storage_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config.json names.

    Raises:
        ExportError: it is none that autoq writes.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in _STORAGE_DTYPES:
        known = ", ".join(_STORAGE_DTYPES)
        raise ExportError(f"dtype in config.json must be one of {known}, got {name!r}")
    return _STORAGE_DTYPES[name]


def model_class(checkpoint: QuantizedCheckpoint, *, trust_remote_code: bool = False) -> Any:
    """The transformers class that config.json names, or the one that the folder brings.

    Args:
        trust_remote_code: run the model code that lies in the folder, if there is some.
    Raises:
        ExportError: transformers has no such class.
    """
    import transformers

    code = checkpoint.config.get("auto_map")
    if trust_remote_code and code:
        return _remote_class(checkpoint, code)
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        remedy = (
            "; its config.json names code of its own, which runs if you trust it" if code else ""
        )
        raise ExportError(
            f"config.json of {checkpoint.path} must name an architecture that transformers has, "
            f"got {name!r}{remedy}"
        )
    return found


def _remote_class(checkpoint: QuantizedCheckpoint, code: Any) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = (
        [code[name] for name in _REMOTE_CLASSES if name in code] if isinstance(code, dict) else []
    )
    if not named:
        raise ExportError(
            f"auto_map in config.json of {checkpoint.path} must name one of "
            f"{', '.join(_REMOTE_CLASSES)}; fetch the model's folder again"
        )
    try:
        return get_class_from_dynamic_module(named[0], str(checkpoint.path), local_files_only=True)
    except Exception as error:  # whatever somebody else's code raises when it is imported
        raise ExportError(
            f"the model code {named[0]} of {checkpoint.path} cannot be run: {error}; "
            "copy it there from the original model's folder"
        ) from error


def built_model(
    checkpoint: QuantizedCheckpoint,
    dtype: torch.dtype,
    *,
    change: Callable[[nn.Module], None] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, set[str]]:
    """The model with every tensor that is stored as it is, read one by one.

    Args:
        change: called before anything is loaded, while the model is on the meta device.
    Returns:
        The model, on the CPU and in eval mode, and the names of the tensors that were not there.
        Those are filled with noise, so whoever does not know them by name has to refuse.
    Raises:
        ExportError: the tensors do not fit the architecture.
    """
    settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    found = model_class(checkpoint, trust_remote_code=trust_remote_code)
    options = {} if change is None else {"quantization_config": before_loading(change)}
    try:
        with quiet_transformers():
            model, report = found.from_pretrained(
                None,
                config=found.config_class.from_dict(settings),
                state_dict={name: checkpoint.slice(name) for name in checkpoint.unquantized_names},
                dtype=dtype,
                experts_implementation="eager",
                output_loading_info=True,
                # So that they come back in the report, by name, and are refused below.
                ignore_mismatched_sizes=True,
                **options,
            )
    except AutoqError:
        raise
    except Exception as error:  # transformers raises many kinds for one thing: it cannot load this
        raise ExportError(f"{checkpoint.path} does not fit its architecture: {error}") from error
    _refuse_surplus(checkpoint, report)
    return model.eval(), {str(name) for name in report["missing_keys"]}


def _refuse_surplus(checkpoint: QuantizedCheckpoint, report: Mapping[str, Any]) -> None:
    unknown = sorted(str(key) for key in report["unexpected_keys"])
    if unknown:
        raise ExportError(
            f"{checkpoint.path} has tensors its architecture does not know: {unknown[0]}"
        )
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise mismatch(checkpoint, name, stored, expected)


def mismatch(
    checkpoint: QuantizedCheckpoint, name: str, stored: Sequence[int], expected: Sequence[int]
) -> ExportError:
    """That a tensor has another shape than the architecture."""
    return ExportError(
        f"{name} must have shape {tuple(expected)} by config.json, and {checkpoint.path} has "
        f"{tuple(stored)}; they do not belong together"
    )


def refuse_missing(checkpoint: QuantizedCheckpoint, missing: set[str]) -> None:
    """Refuse a checkpoint that lacks a tensor.

    Raises:
        ExportError: names the first.
    """
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ExportError(
            f"{checkpoint.path} lacks weights of its architecture: {min(missing)}{more}"
        )


def declared_dtype(model: nn.Module, parameter: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives a parameter: some stay in float32 in any model."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), parameter):
            return kept
    return dtype
