"""Running a checkpoint in the formats it is stored in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from autoq.api.task import resolve_device
from autoq.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint as a transformers model whose quantised weights stay packed.

    The model takes the memory that its plan says. On a GPU its matrix products run on codes and
    scales; on a CPU each weight is dequantised for its product and forgotten, which gives, bit for
    bit, what the searched model was measured with. It generates like any model of transformers. It
    is for inference: no parameter asks for a gradient, and it cannot be saved again.

    Experts of mixture layers are packed too, and computed one by one
    (`experts_implementation="eager"`).

    Args:
        path: a folder that autoq exported, in either container, or one like it. An unquantised
            model is loaded as it is.
        device: "cpu", "cuda", "cuda:N", or "auto": the first GPU if there is one.
        dtype: of unquantised weights and of all activations: float32, bfloat16 or float16; None is
            the checkpoint's own.
        trust_remote_code: run the model code that lies in the folder.
    Returns:
        The model in eval mode. Its tokenizer is left to you:
        `transformers.AutoTokenizer.from_pretrained(path)`.
    Raises:
        InputError: the device or dtype is not as above.
        ExportError: the folder is no readable checkpoint, its manifest and its tensors contradict
            each other, or they do not fit the architecture; names the first that is wrong.
    """
    from autoq.export import load_packed

    wanted, place = _checked_dtype(dtype), resolve_device(str(device))
    model = load_packed(path, dtype=wanted, device=place, trust_remote_code=trust_remote_code)
    return cast("PreTrainedModel", model)


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return cast("torch.dtype | None", dtype)
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}; choose one")
    return _DTYPES[str(dtype)]
