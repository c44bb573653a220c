"""A study's summary as the API gives it, small enough to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search import Plan

TYPES = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def make_summary() -> Callable[..., dict[str, Any]]:
    """Build a summary; arguments replace its entries."""

    def build(blocks: int = 2, **changes: Any) -> dict[str, Any]:
        groups = [
            {
                "name": f"model.layers.{block}.{kind}",
                "slots": [f"model.layers.{block}.{kind}"],
                "reason": "decided alone",
                "format": ("nvfp4", "fp8", "none")[(block + index) % 3],
                "weights": 4096,
                "effective_bits": 4.5,
                "scores": {"nvfp4": 0.01 * (index + 1), "fp8": 0.001 * (block + 1)},
                "standard_errors": {"nvfp4": 0.002, "fp8": None},
                "predicted_loss": 0.01,
            }
            for block in range(blocks)
            for index, kind in enumerate(TYPES)
        ]
        interval = {"value": 0.05, "low": 0.04, "high": 0.07}
        summary = {
            "study": "llama-ab12",
            "model": "models/llama",
            "budget": 6.0,
            "assignment": {group["name"]: group["format"] for group in groups},
            "groups": groups,
            "excluded": [{"name": "lm_head", "reason": "the output layer", "weights": 512}],
            "effective_bits": 5.9375,
            "peer_effective_bits": 5.875,
            "stored_bits_per_weight": 5.96875,
            "stored_bytes": 18336,
            "predicted_loss": 0.0437,
            "predicted_loss_interval": [0.0401, math.inf],
            "bound": 0.0436,
            "gap": 0.0023,
            "unit": "nats_per_token",
            "measured": {"kl_divergence": 0.05, "top1_agreement": 0.9121},
            "measurements": [
                {
                    "label": "6 bits",
                    "effective_bits": 5.9375,
                    "predicted_loss": 0.0437,
                    "metrics": {
                        "kl_divergence": interval,
                        "top1_agreement": {"value": 0.9121, "low": None, "high": None},
                    },
                }
            ],
            "timings_s": {"calibration": 1.5, "sensitivity": 75.0},
            "peak_rss_bytes": 3 << 20,
            "export": None,
            "configuration": {"formats": ["nvfp4", "fp8"], "seed": 7},
            "versions": {"torch": "2.13.0"},
        }
        return {**summary, **changes}

    return build


@pytest.fixture
def plans() -> list[Plan]:
    """A frontier of four plans, the last without loss."""
    return [
        Plan(
            assignment={GroupName("model.layers.0.self_attn.o_proj"): FormatName("fp8")},
            budget_bits=bits,
            effective_bits=bits,
            peer_effective_bits=bits,
            stored_bits_per_weight=bits + 0.03,
            stored_bytes=int(bits * 3072),
            predicted_loss=loss,
            predicted_loss_interval=(loss * 0.9, loss * 1.1),
            bound=loss,
            gap=0.0,
        )
        for bits, loss in [(4.5, 0.06), (6.0, 0.043), (8.0, 0.009), (16.0, 0.0)]
    ]
