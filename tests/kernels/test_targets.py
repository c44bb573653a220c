from __future__ import annotations

import pytest
import torch

from autoq.errors import UnknownNameError
from autoq.kernels import targets
from autoq.kernels.targets import TARGETS, target_of, target_of_capability

ABILITIES = {
    "sm_80": set(),
    "sm_89": {"fp8_type", "fp8_matmul"},
    "sm_90": {"fp8_type", "fp8_matmul", "bulk_copy"},
    "sm_100": {"fp8_type", "fp8_matmul", "bulk_copy", "nvfp4_matmul", "mx_matmul"},
    "sm_120": {"fp8_type", "fp8_matmul", "bulk_copy", "nvfp4_matmul", "mx_matmul"},
    "gfx942": set(),
    "gfx950": {"fp8_type", "fp8_matmul", "mx_matmul"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_abilities(name):
    target = TARGETS[name]
    names = ("fp8_type", "fp8_matmul", "nvfp4_matmul", "mx_matmul", "bulk_copy")
    assert {ability for ability in names if getattr(target, ability)} == ABILITIES[name]


@pytest.mark.parametrize(
    ("capability", "name", "like", "shared_memory_kib"),
    [
        (80, "sm_80", "sm_80", 163),
        (86, "sm_86", "sm_80", 99),
        (87, "sm_87", "sm_80", 163),
        (89, "sm_89", "sm_89", 99),
        (90, "sm_90", "sm_90", 227),
        (100, "sm_100", "sm_100", 227),
        (103, "sm_103", "sm_100", 227),
        (120, "sm_120", "sm_120", 99),
        (121, "sm_121", "sm_120", 99),
    ],
)
def test_capabilities_have_a_target_or_a_larger_relative(capability, name, like, shared_memory_kib):
    target = target_of_capability(capability)
    assert (target.name, target.architecture) == (name, capability)
    assert target.shared_memory_bytes == shared_memory_kib * 1024
    assert target.fp8_matmul == TARGETS[like].fp8_matmul
    assert target.nvfp4_matmul == TARGETS[like].nvfp4_matmul


@pytest.mark.parametrize("capability", [70, 75, 130])
def test_old_and_unknown_gpus_have_none(capability):
    assert target_of_capability(capability) is None


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_other_devices_have_none(kind):
    assert target_of(torch.device(kind)) is None


def test_an_nvidia_gpu_is_told_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert target_of(torch.device("cuda:0")) is TARGETS["sm_90"]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950"), ("gfx90a:xnack-", None)],
)
def test_an_amd_gpu_is_told_by_its_architecture(architecture, name, monkeypatch):
    class Properties:
        gcnArchName = architecture

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert target_of(torch.device("cuda:0")) is (None if name is None else TARGETS[name])


def test_a_wrong_name_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match=r"no target named 'sm_91' \(did you mean sm_90"):
        targets.TARGETS["sm_91"]
