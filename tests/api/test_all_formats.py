"""All formats in one search: scored beside each other, chosen among, exported and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.errors import ExportError, InputError
from autoq.export import read_quantized
from autoq.formats import FORMATS, NONE, Container

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
ALL = tuple(name for name in FORMATS if name != NONE)
OUTSIDE_MODELOPT = {"int8_sq", "int8_wo", "mxfp4"}
MODELOPT_ALONE, NOWHERE = {"nvfp4_svdquant"}, {"int4_dq"}


@pytest.mark.parametrize("container", Container)
def test_they_are_searched_together_and_each_can_be_chosen(
    container: Container, llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    lacking = NOWHERE | (MODELOPT_ALONE if container is COMPRESSED else OUTSIDE_MODELOPT)
    formats = [name for name in ALL if name not in lacking]
    # A format each, and one group is free.
    leaves = (
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj+up_proj",
        "mlp.down_proj",
    )
    groups = [f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves]
    bound = dict(zip(groups[1:], formats[-7:], strict=True))
    study = autoq.search(
        llama_folder,
        **{**quick, "formats": [*formats, NONE], "effective_bits": 7.0},
        rules=[f"{group}={name}" for group, name in bound.items()],
        container=container.value,
        calibration="max",
        export=tmp_path / "out",
    )
    scores = study.sensitivity.scores().sum(axis=0)
    losses = dict(zip(study.sensitivity.formats, scores.tolist(), strict=True))
    assert set(losses) == set(formats)
    assert all(loss > 0 for loss in losses.values())
    four_bits = [losses[name] for name in ("nvfp4", "mxfp4") if name in losses]
    for eight_bits in ("fp8", "fp8_pc_pt", "fp8_block", "mxfp8"):
        assert losses[eight_bits] < min(four_bits)
    stored = read_quantized(tmp_path / "out").formats
    assert set(bound.values()) <= set(stored.values())
    study.store.close()


def test_a_format_that_the_container_cannot_hold_is_refused_by_name(
    llama_folder: Path, quick: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"no layer of this model in mxfp4.*compressed-tensors"):
        autoq.search(
            llama_folder,
            **{**quick, "formats": ("mxfp4", "fp8")},
            container=MODELOPT.value,
        )


def test_a_format_that_no_container_holds_is_searched_and_measured_and_not_exported(
    llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    options = {**quick, "formats": ("int4_dq", "fp8"), "effective_bits": 6.0}
    with pytest.raises(
        InputError, match=r"no container has a place for int4_dq; leave out --export"
    ):
        autoq.search(llama_folder, **options, export=tmp_path / "out")
    study = autoq.search(llama_folder, **options)
    plan = study.plan()
    assert "int4_dq" in plan.assignment.values() and "fp8" in plan.assignment.values()
    assert plan.effective_bits <= 6.0
    with pytest.raises(ExportError, match=r"cannot be int4_dq in modelopt: .*take int4_awq"):
        study.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    study.store.close()


def test_a_branch_of_low_rank_is_stored_exported_and_loaded(
    llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    options = {**quick, "formats": ("nvfp4", "nvfp4_svdquant")}
    study = autoq.search(
        llama_folder,
        **{**options, "effective_bits": 6.0},
        rules=["*.mlp.down_proj=nvfp4_svdquant"],
        export=tmp_path / "out",
    )
    assert "nvfp4_svdquant" in study.plan().assignment.values()
    scores = study.sensitivity.scores().sum(axis=0)
    losses = dict(zip(study.sensitivity.formats, scores.tolist(), strict=True))
    assert losses["nvfp4_svdquant"] < 0.9 * losses["nvfp4"]
    loaded = autoq.load(tmp_path / "out")
    ranks = [m.branch.rank for m in loaded.modules() if getattr(m, "branch", None) is not None]
    assert set(ranks) <= {4, 8} and ranks  # of 64 and of 128 rows or columns
    study.store.close()
