"""All formats in one search: scored beside each other, chosen among, exported and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.errors import InputError
from autoq.export import read_quantized
from autoq.formats import FORMATS, NONE, Container

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
ALL = tuple(name for name in FORMATS if name != NONE)
OUTSIDE_MODELOPT = {"int8_sq", "int8_wo", "mxfp4"}


@pytest.mark.parametrize("container", Container)
def test_they_are_searched_together_and_each_can_be_chosen(
    container: Container, llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    formats = [name for name in ALL if container is COMPRESSED or name not in OUTSIDE_MODELOPT]
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
