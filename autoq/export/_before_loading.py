"""Changing a model between its construction and the loading of its tensors.

transformers lets a quantisation method replace modules at that point, when every parameter is
still on the meta device; autoq registers itself as one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from autoq.errors import ExportError

METHOD = "autoq"
"""The quantisation method's name inside transformers; no checkpoint carries it."""


def before_loading(change: Callable[[nn.Module], None]) -> Any:
    """What to give to `from_pretrained` as `quantization_config`, so that it calls `change`.

    The model is on the meta device then. Afterwards it counts as quantised: it can neither be
    trained nor saved with `save_pretrained`.
    """
    return _configuration_class()(change)


@cache
def _configuration_class() -> Any:
    """The configuration's class; both classes are registered when it is first asked for."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class Configuration(QuantizationConfigMixin):
        def __init__(self, change: Callable[[nn.Module], None]) -> None:
            super().__init__(quant_method=METHOD)  # type: ignore[arg-type]
            self.change = change

        def __deepcopy__(self, _: Any) -> Configuration:
            return self  # what `change` refers to holds open files

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    @register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            # Around this call new tensors are on the meta device.
            with torch.device("cpu"):
                self.quantization_config.change(model)  # type: ignore[attr-defined]
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            raise ExportError(
                "a packed model cannot be saved again; copy the checkpoint that it was loaded from"
            )

        @property
        def is_trainable(self) -> bool:
            return False

    return Configuration
