"""What an engine checkpoint of TensorRT-LLM holds beside the linears of layers, shared by ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from autoq.export._folding import fold, folded_scales
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_families import HEAD, POSITIONS
from autoq.export._tensorrt_llm_names import Parallel, family_of

RankTensors = list[dict[str, Tensor]]
"""Name -> tensor for each rank of a stage, in their order."""


def add_norm(ranks: RankTensors, plan: ExportPlan, path: str, engine: str) -> None:
    """A norm with the input scales of the layers after it, the same on all ranks."""
    folds = folded_scales(plan.slot_formats, plan.calibration)
    for leaf, tensor in plan.model.get_submodule(path).named_parameters(recurse=False):
        stored = _stored_norm(plan, leaf, tensor)
        stored = fold(f"{path}.{leaf}", stored, folds)[0]
        add(ranks, f"{engine}.{leaf}", [stored] * len(ranks))


def _stored_norm(plan: ExportPlan, leaf: str, parameter: Tensor) -> Tensor:
    """A norm's parameter as the engine multiplies by it, without input scales."""
    if leaf == "weight" and family_of(plan.model).adds_one:
        parameter = parameter.float() + 1
    return parameter.detach().to(plan.scale_dtype)


def add_positions(ranks: RankTensors, plan: ExportPlan, parallel: Parallel) -> None:
    """Learned positions, of families that have them."""
    path = family_of(plan.model).positions
    if path is not None:
        matrix = plan.model.get_parameter(f"{path}.weight").detach().to(plan.scale_dtype)
        add(ranks, f"{POSITIONS}.weight", _by_rows(_filled_up(matrix, parallel), parallel))


def add_head_bias(ranks: RankTensors, plan: ExportPlan, parallel: Parallel) -> None:
    """The head's bias, of models that have one."""
    bias = head_bias(plan.model)
    if bias is not None:
        column = bias.detach().to(plan.scale_dtype).unsqueeze(1)
        filled = _filled_up(column, parallel).squeeze(1)
        add(ranks, f"{HEAD}.bias", iter(filled.chunk(parallel.tensor)))


def head_bias(model: nn.Module) -> Tensor | None:
    """Bias of the output head, of models that have one."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    bias: Tensor | None = getattr(head, "bias", None)
    return bias


def vocabulary(plan: ExportPlan, which: str, parallel: Parallel) -> Iterator[Tensor]:
    """Each rank's rows of the embedding ("input") or the head, zeros up to a multiple of them."""
    getter = getattr(plan.model, f"get_{which}_embeddings")
    weight: Tensor = getter().weight.detach().to(plan.scale_dtype)
    return _by_rows(_filled_up(weight, parallel), parallel)


def _filled_up(matrix: Tensor, parallel: Parallel) -> Tensor:
    return functional.pad(matrix, (0, 0, 0, -len(matrix) % parallel.tensor))


def _by_rows(matrix: Tensor, parallel: Parallel) -> Iterator[Tensor]:
    return iter(matrix.chunk(parallel.tensor))


def add(ranks: RankTensors, name: str, shares: Sequence[Tensor] | Iterator[Tensor]) -> None:
    """A tensor for every rank, in their order."""
    module, _, leaf = name.rpartition(".")
    for tensors, share in zip(ranks, shares, strict=True):
        add_one(tensors, module, {leaf: share})


def add_one(tensors: dict[str, Tensor], module: str, held: Mapping[str, Tensor]) -> None:
    """Tensors of one module of one rank."""
    for leaf, tensor in held.items():
        # Safetensors refuses tensors that share memory, as those of two ranks do.
        tensors[f"{module}.{leaf}"] = tensor.detach().cpu().contiguous().clone()
