"""Experts in compressed-tensors checkpoints: what transformers unpacks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from autoq.api.exports.exporting import inexpressible
from autoq.errors import ExportError
from autoq.export import LOGITS_BOUND, load_packed, verify_checkpoint, verify_logits
from autoq.export.reader import read_quantized
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import Container
from autoq.models import SlotKind, SlotName
from autoq.testing.tiny_models import write_family_model

COMPRESSED = Container.COMPRESSED_TENSORS
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v3")
UNPACKED = ("int4_awq", "int8_wo")
FolderPlan = Callable[..., Any]


@pytest.fixture
def mixture(folder_plan: FolderPlan, tmp_path: Path) -> Callable[[str], Any]:
    """A family's tiny model, with nothing quantised yet."""
    return lambda family: folder_plan(
        write_family_model(family, tmp_path / "model"), COMPRESSED, NONE
    )


def experts(planned: Any) -> list[SlotName]:
    slots = planned.tiny.model_map.slots.values()
    return [slot.name for slot in slots if slot.kind is SlotKind.EXPERT]


@pytest.mark.parametrize("fmt", UNPACKED)
@pytest.mark.parametrize(
    "family",
    [
        name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.slow)
        for name in MIXTURES
    ],
)
def test_experts_beside_another_format_are_read_by_transformers(
    family: str, fmt: str, mixture: Callable[[str], Any], tmp_path: Path, input_ids: Tensor
) -> None:
    """Shared experts, too, are in that other format, whose group must not be taken for theirs."""
    planned = mixture(family)
    routed = experts(planned)
    assert routed
    plan = {name: FormatName("fp8") for name in planned.slot_formats}
    planned = planned.with_formats({**plan, **dict.fromkeys(routed, FormatName(fmt))})
    result = planned.export(tmp_path / "out")
    report = verify_checkpoint(result.path, *planned.expected())
    assert report.quantized_matrices == len(planned.slot_formats)
    assert verify_logits(result.path, input_ids) <= LOGITS_BOUND
    load_packed(result.path)
    groups = read_quantized(result.path).manifest["config_groups"]
    speaking = [g for g in groups.values() if any("experts" in target for target in g["targets"])]
    assert speaking[0]["weights"]["type"] == "int"


@pytest.mark.parametrize("fmt", sorted(set(FORMATS) - {NONE, *UNPACKED}))
def test_experts_in_other_formats_are_refused(fmt: str, mixture: Callable[[str], Any]) -> None:
    planned = mixture("mixtral")
    planned = planned.with_formats(dict.fromkeys(experts(planned), FormatName(fmt)))
    reasons = {line for line in planned.refusals() if "experts.0.gate_up_proj" in line}
    assert any("fused experts" in line or "cannot be" in line for line in reasons)


@pytest.mark.parametrize("other", [NONE, "int8_wo"])
def test_layers_whose_experts_differ_are_refused(
    other: str, mixture: Callable[[str], Any], tmp_path: Path
) -> None:
    planned = mixture("mixtral")
    plan = {
        name: FormatName("int4_awq" if "layers.0." in name else other) for name in experts(planned)
    }
    message = rf"experts of all layers .* one format, got int4_awq, {other}: model\.layers\.0\."
    with pytest.raises(ExportError, match=message):
        planned.with_formats(plan).export(tmp_path / "out")


def test_one_format_for_all_can_take_what_single_layers_cannot(
    mixture: Callable[[str], Any],
) -> None:
    tiny = mixture("mixtral").tiny
    formats = [FormatName("int4_awq"), FormatName("fp8")]
    alone = inexpressible(tiny.model, tiny.model_map, formats, COMPRESSED)
    together = inexpressible(tiny.model, tiny.model_map, formats, COMPRESSED, together=True)
    layers = [f"model.layers.{number}.mlp.experts" for number in range(2)]
    assert list(alone) == [(layer, fmt) for layer in layers for fmt in formats]
    assert list(together) == [(layer, "fp8") for layer in layers]


@pytest.mark.parametrize("fmt", ["int4_awq", NONE])
def test_engines_find_mixtral_experts_by_the_names_that_they_look_for(
    fmt: str, mixture: Callable[[str], Any], tmp_path: Path
) -> None:
    """SGLang asks for gate_proj, up_proj and down_proj, and the checkpoint has w1, w3 and w2."""
    from autoq.export._manifest_reading import pattern_matcher

    planned = mixture("mixtral")
    plan = dict.fromkeys(planned.slot_formats, FormatName("int4_awq"))
    planned = planned.with_formats({**plan, **dict.fromkeys(experts(planned), FormatName(fmt))})
    manifest = read_quantized(planned.export(tmp_path / "out").path).manifest
    targets = [target for g in manifest["config_groups"].values() for target in g["targets"]]
    found = pattern_matcher(targets if fmt != NONE else manifest["ignore"])
    for leaf in ("w1", "w3", "w2", "gate_proj", "up_proj", "down_proj"):
        assert found(f"model.layers.1.block_sparse_moe.experts.0.{leaf}")
