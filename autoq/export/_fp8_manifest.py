"""The manifest of transformers' own `fp8` checkpoints: blocks of FP8 everywhere but where it says.

The layout of DeepSeek-V3, which transformers, vLLM, SGLang and TensorRT-LLM read alike. Tensors are
those of blocks in compressed-tensors, and only the scale has another name. Executed with
transformers 5.23 on a CPU, which widens the weights while loading and leaves inputs alone; read in
the others' sources (vLLM 0.33, SGLang 0.5.23, TensorRT-LLM of about 1.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoq.errors import ExportError
from autoq.export._aliases import fused_aliases
from autoq.formats import NONE, FormatName

METHOD = "fp8"
BLOCK_FORMAT = FormatName("fp8_block")
BLOCK_SIZE = [128, 128]  # rows, columns
LEFT_OUT = ("modules_to_not_convert", "ignored_layers")
"""Keys under which readers look for what is not quantised; the first is the one that is written."""

_STORED = {"weight_scale": "weight_scale_inv"}
_OURS = {stored: name for name, stored in _STORED.items()}


def stored_name(suffix: str) -> str:
    """What a tensor of compressed-tensors is called here, after the module's name."""
    return _STORED.get(suffix, suffix)


def our_name(suffix: str) -> str:
    """`stored_name`'s inverse."""
    return _OURS.get(suffix, suffix)


def fp8_manifest(
    formats: Mapping[str, FormatName], exported_by: Mapping[str, Any]
) -> dict[str, Any]:
    """What readers need to know.

    Args:
        formats: checkpoint module name -> `fp8_block` or "none".
        exported_by: who wrote the checkpoint and from what; JSON values.
    """
    # SGLang asks for the fused name where a model's class does not say what it fuses.
    fused = [name for name, (_, fmt) in fused_aliases(formats).items() if fmt == NONE]
    left_out = [name for name, fmt in formats.items() if fmt == NONE]
    return {
        "quant_method": METHOD,
        "activation_scheme": "dynamic",
        "weight_block_size": BLOCK_SIZE,
        LEFT_OUT[0]: [*left_out, *fused],
        "exported_by": dict(exported_by),
    }


def left_out_modules(manifest: Mapping[str, Any]) -> list[str]:
    """Names of what is not quantised.

    Raises:
        ExportError: it is no list of names, or the blocks are others than of 128 x 128.
    """
    if list(manifest.get("weight_block_size") or ()) != BLOCK_SIZE:
        raise ExportError(
            f"an fp8 checkpoint must have weight_block_size {BLOCK_SIZE} to be read, got "
            f"{manifest.get('weight_block_size')}"
        )
    found: Any = next((manifest[key] for key in LEFT_OUT if manifest.get(key) is not None), [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ExportError(f"{LEFT_OUT[0]} must be a list of names, got {found!r}")
    return found


def fp8_faults(manifest: Mapping[str, Any], formats: Mapping[str, FormatName]) -> Iterator[str]:
    """What is wrong with a manifest, a line each.

    Args:
        manifest: config.json's quantization_config.
        formats: format of every linear module of the checkpoint, "none" included.
    """
    try:
        left_out = set(left_out_modules(manifest))
    except ExportError as error:
        yield str(error)
        return
    if manifest.get("quant_method") != METHOD or manifest.get("activation_scheme") != "dynamic":
        yield "quant_method must be fp8 and activation_scheme dynamic"
    fused = {name: fmt for name, (_, fmt) in fused_aliases(formats).items()}
    for name, fmt in {**formats, **fused}.items():
        if (name in left_out) != (fmt == NONE):
            yield f"{LEFT_OUT[0]} must hold {name} if and only if it is not quantised"
    quantized = [name for name, fmt in formats.items() if fmt != NONE]
    for entry in left_out:
        # transformers takes an entry for a module's end, too, and TensorRT-LLM for a shell pattern;
        # a name that is no part of another is safe from every such rule.
        hit = next((name for name in quantized if entry in name), None)
        if hit is not None:
            yield f"{entry}, which is left out, is part of the name of {hit}, which is quantised"
