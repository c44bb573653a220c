"""Where a decision group stands in the model, read from its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIRST_INDEX = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<block>\d+)\.(?P<type>.+)$")


@dataclass(frozen=True, slots=True)
class LayerPosition:
    """Stack and block of a group, and its type within the block.

    A group outside every block has neither stack nor block, and its whole name is its type.
    """

    stack: str | None  # "model.layers"; None outside the blocks
    block: int | None
    type: str  # "self_attn.q_proj+k_proj+v_proj"


def layer_position(name: str) -> LayerPosition:
    """The position that a module path such as `model.layers.3.mlp.down_proj` states."""
    match = _FIRST_INDEX.match(name)
    if match is None:
        return LayerPosition(None, None, name)
    return LayerPosition(match["stack"], int(match["block"]), match["type"])


def short_type(type_name: str) -> str:
    """The last part of a type, fused projections joined: `self_attn.q_proj+k_proj` -> `q/k`."""
    last = type_name.rpartition(".")[2]
    parts = last.split("+")
    if len(parts) > 1 and all(part.endswith("_proj") for part in parts):
        parts = [part.removesuffix("_proj") for part in parts]
    return "/".join(parts)
