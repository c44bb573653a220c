"""Writing a plan as the checkpoint that TensorRT-LLM's engine builder (`trtllm-build`) takes.

One safetensors file a rank, layers fused and split as the ranks run them, config.json in the
engine's words, and quant_cfg.json where formats are mixed. Everything about the reader is read in
its sources, at versions 0.16 to 1.2, and not run. What the reader makes of it differs from the
simulation by roundings to the model's dtype: of w4a8_awq, those of the quotients of group scale and
tensor scale and of input multiplier and input scale; of fp8, those of the scales, unless the engine
is built with `--gemm_plugin fp8`; of Gemma's norms, those of one plus their weights. A quantised
key/value cache has one scale for a layer's keys and values, where the simulation has two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from autoq.export._folder import check_destination, copy_companions, exported_files, written_folder
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_config import engine_config
from autoq.export._tensorrt_llm_layouts import quantization
from autoq.export._tensorrt_llm_names import Parallel, family_of, layer_count
from autoq.export._tensorrt_llm_ranks import linear_format, linears, stage_tensors
from autoq.export._tensorrt_llm_refusals import (
    DTYPES,
    refuse_tensorrt_llm,
    tensorrt_llm_refusals,
    tensorrt_llm_warnings,
)
from autoq.export._tensorrt_llm_verify import TensorRtLlmReport, verify_tensorrt_llm
from autoq.export._types import ExportedFile
from autoq.formats import NONE, FormatName

__all__ = [
    "Parallel",
    "TensorRtLlmExport",
    "TensorRtLlmReport",
    "export_tensorrt_llm",
    "refuse_tensorrt_llm",
    "tensorrt_llm_refusals",
    "tensorrt_llm_warnings",
    "verify_tensorrt_llm",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtLlmExport:
    """A checkpoint that is complete on disk, and was read back."""

    path: Path
    files: tuple[ExportedFile, ...]
    stored_bytes: int  # of the ranks' files, headers included
    report: TensorRtLlmReport


def export_tensorrt_llm(
    plan: ExportPlan,
    *,
    source: Path | None,
    destination: Path,
    parallel: Parallel,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[], None] | None = None,
) -> TensorRtLlmExport:
    """Write the ranks' files; the folder appears complete and read back, or not.

    One pipeline stage of the checkpoint is held in memory at a time.

    Args:
        plan: the model holds the original weights, in any dtype; it is not changed.
        source: the model's folder, from which the tokenizer is copied.
        destination: the folder to create.
        overwrite: replace a checkpoint that is at `destination`.
        provenance: what to say of the checkpoint's origin in config.json; JSON values.
        progress: called after each layer.
    Raises:
        ExportError: the checkpoint cannot hold the plan, or the model cannot be split like this, or
            the destination is in use or cannot be written.
        VerificationError: what was written does not read back bit for bit.
    """
    refuse_tensorrt_llm(plan, parallel)
    check_destination(destination, source, overwrite=overwrite)
    with written_folder(destination, overwrite=overwrite) as folder:
        for stage in range(parallel.pipeline):
            ranks = stage_tensors(plan, parallel, stage, progress or _nothing)
            for place, tensors in enumerate(ranks):
                save_file(tensors, folder / f"rank{place + stage * parallel.tensor}.safetensors")
            del ranks
        _write_configuration(plan, parallel, folder, provenance or {})
        if source is not None:
            copy_companions(source, folder)
        report = verify_tensorrt_llm(folder, plan)
        files = exported_files(folder)
    return TensorRtLlmExport(
        path=destination, files=files, stored_bytes=report.stored_bytes, report=report
    )


def _write_configuration(
    plan: ExportPlan, parallel: Parallel, folder: Path, provenance: Mapping[str, Any]
) -> None:
    size = layer_count(plan.model) // parallel.pipeline
    formats = {
        f"transformer.layers.{layer}.{linear.name}": linear_format(plan, layer, linear)
        for layer, linear, _ in linears(plan)
        if layer < size
    }
    head, layers = quantization(formats, _left_out(formats, plan), plan.cache_format)
    config = {
        "producer": {"name": "autoq"},
        **engine_config(plan.model, DTYPES[plan.scale_dtype], parallel),
        "quantization": head,
        "exported_by": {"name": "autoq", **provenance},
    }
    _write_json(folder / "config.json", config)
    if layers is not None:
        _write_json(folder / "quant_cfg.json", layers)


def _left_out(formats: Mapping[str, FormatName], plan: ExportPlan) -> Iterator[str]:
    """Routers, and the engine's modules of experts that stay as they are."""
    if not family_of(plan.model).has_experts:
        return
    for name, fmt in formats.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "fc":
            yield f"{module}.router"
            if fmt == NONE:
                yield module


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _nothing() -> None:
    """Nobody asked to be told."""
