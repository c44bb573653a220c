"""What calibration gives a layer, what quantising its weight gives back, and for whose run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from autoq.formats import Container, FormatName
from autoq.layers.low_rank import LowRank

__all__ = ["Container", "LayerCalibration", "LowRank", "QuantizedWeight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCalibration:
    """The calibrated parameters of one weight slot in one format.

    With an AWQ scale p the layer computes (x * p) @ (W / p).T; p holds powers of two only, so
    that folding it anywhere is exact in floating point. `weight_amax` and `input_amax` are those
    of W / p and x * p.

    For INT4 weights with a second level `weight_amax` is the largest |code * group scale| over the
    fusion set, not the largest |W / p|: its scale, weight_amax / 448, must cover what the codes
    stand for.

    With a branch of low rank L the layer computes (x * p) @ L.T + (x * p) @ (W / p - L).T, and only
    the second product is quantised: codes, `weight_amax` and `importance` are of W / p - L.
    """

    weight_amax: float  # shared over the fusion set; the format's top scale derives from it
    input_amax: float  # shared over the fusion or input set
    pre_quant_scale: Tensor | None = None  # float32 [in_features], powers of two; None: all ones
    folds_into: str | None = None  # path of the norm that can absorb pre_quant_scale exactly
    importance: Tensor | None = None  # float32 [in_features], mean squares of x * p's channels
    """Block scales of W / p are those that leave the least error weighted by it; None: those of the
    largest magnitudes. Codes and scales follow from the weight and this, bit for bit, anywhere."""
    block_scale: Tensor | None = None  # as QuantizedWeight has the format's, of W / p
    """Block scales that were chosen by more than `importance`, which they are then taken in place of."""
    codes: Tensor | None = (
        None  # uint8 [out_features, in_features / 2], even column in the low nibble
    )
    """Codes of W / p in the format's 4-bit element, under `block_scale`, those that `importance` leaves
    or those of the largest magnitudes; None: the nearest ones."""
    low_rank: LowRank | None = None  # of W / p, of formats with such a branch; None: zeros
    input_rows: int | None = None  # input rows that calibration saw: an expert's are routed to it


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Codes and scales of one weight matrix, in no container's packing.

    `tensors` by format:
        fp8: "codes" float8_e4m3fn [N, K], "scale" float32 [].
        fp8_pc_pt, fp8_block: the same, the scale [N, 1] or [ceil(N/128), ceil(K/128)].
        nvfp4, nvfp4_wo: "codes" uint8 [N, K/2] (even column in the low nibble), "block_scale"
            float8_e4m3fn [N, K/16], "global_scale" float32 [].
        mxfp8, mxfp4: "codes" float8_e4m3fn [N, K] or uint8 [N, K/2], "block_scale" uint8 [N, K/32].
        int4_awq: "codes" int8 [N, K] in -8..7, "group_scale" float32 [N, K/128] (rounded to the
            model's dtype).
        int4_dq: "codes" likewise, "scale_codes" int8 [N, K/64], "second_scale" float32
            [ceil(N*K/64/256)], "mean_scale" float32 [].
        w4a8_awq: those of int4_awq, and "tensor_scale" float32 [] (amax of codes*group_scale over the
            fusion set / 448).
        int8_sq, int8_wo: "codes" int8 [N, K] in -127..127, "scale" float32 [N, 1] (of int8_wo
            rounded to the model's dtype).
        nvfp4_svdquant: those of nvfp4, and "low_rank_down" bfloat16 [rank, K], "low_rank_up" [N, rank].
    """

    format: FormatName
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
