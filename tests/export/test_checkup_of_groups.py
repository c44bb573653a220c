"""What `autoq verify` says of groups that overlap or are for nobody, and of inputs' scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from autoq.export.checkup import check_checkpoint
from autoq.formats import FormatName, parse_target
from autoq.layers import Container
from tests.export.conftest import Planned

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
DOWN = "model.layers.0.mlp.down_proj"
Uniform = Callable[[str, Container, str], Planned]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def grouped(
    mixed_plan: Callable[[str, Container], Planned], tmp_path: Path
) -> Callable[[Edit], Path]:
    """A mixed compressed-tensors checkpoint with a changed manifest."""

    def make(edit: Edit) -> Path:
        folder = mixed_plan("llama", COMPRESSED).export(tmp_path / "out").path
        path = folder / "config.json"
        config = json.loads(path.read_text())
        edit(config["quantization_config"])
        path.write_text(json.dumps(config))
        return folder

    return make


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["config_groups"].values())


def test_a_pattern_that_matches_nothing_is_for_nobody(grouped: Any) -> None:
    pattern = r"re:^model\.layers\.0\.mlp\.downproj$"
    folder = grouped(lambda manifest: groups(manifest)[0]["targets"].append(pattern))
    [fault] = check_checkpoint(folder).faults
    assert "a config group is for" in fault
    assert "downproj" in fault


@pytest.mark.parametrize(
    ("entry", "is_wrong"),
    [
        (r"re:^model\.layers\.0\.self_atn", True),
        ("re:.*vision_tower.*", True),
        ("re:.*lm_head", False),
        (r"re:.*embed_tokens$", False),
        (r"re:.*\.norm$", False),
        ("model.layers.9.mlp.down_proj", False),
    ],
)
def test_a_pattern_that_leaves_nothing_out(grouped: Any, entry: str, *, is_wrong: bool) -> None:
    """Plain names that are gone are passed over; many manifests leave out a head that is tied."""
    folder = grouped(lambda manifest: manifest["ignore"].append(entry))
    found = check_checkpoint(folder).faults
    assert any("matches no module" in fault for fault in found) == is_wrong, found


def test_two_patterns_for_one_module(grouped: Any) -> None:
    """They are searched in the order of the groups by one reader, of their letters by another."""
    folder = grouped(lambda manifest: None)
    layers = check_checkpoint(folder).layers
    module = next(layer.name for layer in layers if layer.stored != "unquantised")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    first, second = groups(config["quantization_config"])[:2]
    first["targets"].append(module)
    second["targets"].append(f"re:.*{module.partition('layers.')[2]}$")
    path.write_text(json.dumps(config))
    found = check_checkpoint(folder).faults
    assert any(f"config groups match {module}; one may" in fault for fault in found), found


def test_a_name_goes_before_the_class(uniform_plan: Uniform, tmp_path: Path) -> None:
    """All engines look for the module's name first: one group may be for all that others leave."""
    folder = uniform_plan("llama", COMPRESSED, "fp8").export(tmp_path / "out").path
    path = folder / "config.json"
    config = json.loads(path.read_text())
    manifest = config["quantization_config"]
    [(name, group)] = manifest["config_groups"].items()
    group["targets"] = ["Linear"]
    named = {**group, "targets": [DOWN]}
    manifest["config_groups"] = {name: group, "group_of_one": named}
    path.write_text(json.dumps(config))
    assert check_checkpoint(folder).faults == ()

    named["weights"] = {**group["weights"], "num_bits": 5}
    path.write_text(json.dumps(config))
    report = check_checkpoint(folder, parse_target("vllm:h100"))
    stored = {layer.name: layer.stored for layer in report.layers}
    assert stored[DOWN] != "fp8"
    assert stored[DOWN.replace("down", "up")] == "fp8"


INPUT_SCALES = {"fp8": "input_scale", "nvfp4": "input_global_scale"}


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
@pytest.mark.parametrize("container", Container)
def test_scales_of_inputs_that_are_turned_over(
    uniform_plan: Uniform, tmp_path: Path, container: Container, fmt: str
) -> None:
    """The largest input is 3.7: turned over FP8's scale allows 448 * 448 / 3.7, which is 54,245."""
    folder = uniform_plan("llama", container, FormatName(fmt)).export(tmp_path / "out").path
    assert check_checkpoint(folder).faults == ()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    leaf = "input_scale" if container is MODELOPT else INPUT_SCALES[fmt]
    scales = [name for name in tensors if name.endswith(f".{leaf}")]
    assert len(scales) == 14

    for name in scales[:6]:  # fewer than half may be large: some layers have such inputs
        tensors[name] = 1 / tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert not any("reciprocals" in fault for fault in check_checkpoint(folder).faults)

    for name in scales[6:]:
        tensors[name] = 1 / tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    found = [fault for fault in check_checkpoint(folder).faults if "reciprocals" in fault]
    assert len(found) == 1
    reach = {"fp8": 448**2 / 3.7, "nvfp4": 2688**2 / 3.7}[fmt]
    assert f"reach {reach:.3g}" in found[0]
