"""The checkpoint containers: how a searched model is written down."""

from __future__ import annotations

from enum import StrEnum


class Container(StrEnum):
    """The checkpoint container whose run-time numerics are meant.

    They differ for INT4 weights with FP8 activations only. Engines that load MODELOPT round
    code * scale once more to E4M3 under a per-tensor scale, and quantise the input under a static
    scale; those that load COMPRESSED_TENSORS multiply code by scale, and quantise each token of
    the input under its own scale.
    """

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"
