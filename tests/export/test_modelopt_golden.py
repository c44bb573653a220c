"""The modelopt container beside what ModelOpt 0.47 writes of the same model: tensor by tensor.

The files are made by `make_modelopt_golden.py`. Scales that ModelOpt calibrated are taken from them;
with those, codes and block scales follow from the weights.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoq.calibration.svdquant import low_rank_branch
from autoq.export._modelopt_manifest import modelopt_manifest
from autoq.export._packing import packed_tensors
from autoq.export._unpacking import checked_tensors, unpacked_calibration, unpacked_weight
from autoq.formats import FORMATS, NONE, Container, FormatName
from autoq.kernels import int4
from autoq.layers import LowRank
from autoq.layers.quantize import quantize_weight
from autoq.models import SlotKind
from autoq.testing.tiny_models import write_tiny_model

GOLDEN = Path(__file__).parent / "modelopt_golden"
MANIFESTS = json.loads((GOLDEN / "manifests.json").read_text())
MODULES = (
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
)
ALL_FORMATS = (
    *("fp8", "fp8_pc_pt", "nvfp4", "nvfp4_wo", "nvfp4_svdquant"),
    *("mxfp8", "int4_awq", "w4a8_awq"),
)
ALONE = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
"""Linears that ModelOpt fuses with none: it finds branches of fused ones once more, together."""
SAME_BITS = ("fp8_pc_pt", "nvfp4", "nvfp4_wo", "mxfp8")
"""Formats whose every bit follows from weights and stored scales in the same arithmetic."""

OTHER_FP8_CODES = 0.05
"""ModelOpt divides by a per-tensor FP8 scale in bfloat16 on CPUs, autoq in float32 as GPUs do: of
quotients near the middle between two codes some fall to the other side."""

OTHER_INT4_CODES = 0.01
"""ModelOpt divides by its AWQ scale in float32 and stores it in bfloat16, so the quotients can be had
again to 8 bits only: near the middle between two codes some fall to the other side."""


OTHER_E2M1_CODES = 0.03
"""ModelOpt smooths weights and takes the branch off them in bfloat16, autoq in float32; measured 0.018
at most."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tiny model that ModelOpt was given."""
    folder = write_tiny_model("llama", tmp_path_factory.mktemp("model"))
    file = folder / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == MANIFESTS["source_sha256"], (
        "the tiny model is another than the golden files were made of: make them again"
    )
    return load_file(file)


@cache
def golden(fmt: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{fmt}.safetensors")


def of_module(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    start = f"{module}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def packed_here(fmt: str, module: str, weight: Tensor) -> dict[str, Tensor]:
    """What autoq writes of the weight under the scales that ModelOpt found."""
    name, shape = FormatName(fmt), (weight.shape[0], weight.shape[1])
    stored = checked_tensors(
        module,
        of_module(golden(fmt), module),
        container=Container.MODELOPT,
        fmt=name,
        shape=shape,
        kind=SlotKind.LINEAR,
    )
    theirs = unpacked_weight(stored, container=Container.MODELOPT, fmt=name, shape=shape)
    calibration = unpacked_calibration(stored, theirs, Container.MODELOPT)
    quantized = quantize_weight(weight, FORMATS[name], calibration, scale_dtype=torch.float32)
    return packed_tensors(
        quantized,
        calibration,
        first_row=0,
        rows=shape[0],
        container=Container.MODELOPT,
        kind=SlotKind.LINEAR,
        storage_dtype=torch.bfloat16,
        pre_quant_scale=calibration.pre_quant_scale,
    )


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_names_dtypes_and_shapes_are_modelopts(
    fmt: str, module: str, source: dict[str, Tensor]
) -> None:
    theirs = of_module(golden(fmt), module)
    ours = packed_here(fmt, module, source[f"{module}.weight"])

    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in theirs.items()
    }


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("fmt", SAME_BITS)
def test_every_bit_is_modelopts(fmt: str, module: str, source: dict[str, Tensor]) -> None:
    ours = packed_here(fmt, module, source[f"{module}.weight"])

    for name, tensor in of_module(golden(fmt), module).items():
        assert torch.equal(bits(ours[name]), bits(tensor)), name


@pytest.mark.parametrize("module", MODULES)
def test_fp8_codes_are_modelopts_but_for_its_rounding_of_quotients(
    module: str, source: dict[str, Tensor]
) -> None:
    theirs = of_module(golden("fp8"), module)
    ours = packed_here("fp8", module, source[f"{module}.weight"])

    assert torch.equal(ours["weight_scale"], theirs["weight_scale"])
    assert torch.equal(ours["input_scale"], theirs["input_scale"])
    apart = (ours["weight"].view(torch.int8).int() - theirs["weight"].view(torch.int8).int()).abs()
    assert int(apart.max()) <= 1  # codes of one sign are in the order of their values
    assert float((apart > 0).float().mean()) < OTHER_FP8_CODES


@pytest.mark.parametrize(
    "module", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
)
@pytest.mark.parametrize("fmt", ["int4_awq", "w4a8_awq"])
def test_int4_rows_are_packed_as_modelopt_packs_them(
    fmt: str, module: str, source: dict[str, Tensor]
) -> None:
    theirs = of_module(golden(fmt), module)
    smoothed = source[f"{module}.weight"].float() / theirs["pre_quant_scale"].float()
    step = theirs["weight_scale"].repeat_interleave(128, dim=1)
    expected = torch.clamp((smoothed / step).round(), -8, 7)

    codes = int4.unpack_rows(theirs["weight"].contiguous()).float()

    assert float((codes - expected).abs().max()) <= 1
    assert float((codes != expected).float().mean()) < OTHER_INT4_CODES


@pytest.mark.parametrize("module", ALONE)
def test_branch_is_of_the_smoothed_weight_and_codes_are_of_what_it_leaves(
    module: str, source: dict[str, Tensor]
) -> None:
    theirs = of_module(golden("nvfp4_svdquant"), module)
    weight = source[f"{module}.weight"].float()
    smoothed = weight / theirs["pre_quant_scale"].float()
    down, up = (theirs[f"weight_quantizer._svdquant_lora_{name}"] for name in "ab")
    branch = low_rank_branch(smoothed, len(down))
    left = smoothed - LowRank(down, up).values()
    # bfloat16 rounds their weight, factors and rest; of a branch elsewhere nothing would be left out.
    assert float((smoothed - branch.values()).norm() / left.norm()) == pytest.approx(1.0, abs=5e-3)
    assert left.norm() < 0.8 * smoothed.norm()

    ours = packed_here("nvfp4_svdquant", module, source[f"{module}.weight"])

    assert torch.equal(bits(ours["weight_scale_2"]), bits(theirs["weight_scale_2"]))
    pairs = [torch.stack([t & 0xF, t >> 4]) for t in (ours["weight"], theirs["weight"])]
    assert float((pairs[0] != pairs[1]).float().mean()) < OTHER_E2M1_CODES


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_manifests_say_of_the_format_what_modelopts_say(fmt: str) -> None:
    formats = {module: FormatName(fmt) for module in MODULES} | {"lm_head": NONE}

    ours = modelopt_manifest(formats, exported_by={})
    theirs: dict[str, Any] = MANIFESTS[fmt]

    for key in ("quant_method", "quant_algo", "producer"):
        assert ours.flat[key] == theirs["flat"][key]
    said = {k: v for k, v in theirs["nested"]["quantization"].items() if k != "exclude_modules"}
    assert {key: ours.nested["quantization"][key] for key in said} == said
    assert ours.nested["quantization"]["exclude_modules"] == ["lm_head"]
