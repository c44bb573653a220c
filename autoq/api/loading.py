"""Running a checkpoint in the formats it is stored in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from autoq.api.task import longest_sequence, resolve_device
from autoq.errors import InputError
from autoq.models import load_tokenizer

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


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint and let it continue a prompt, with the likeliest token each time.

    Args:
        path: as `load`; the folder also holds the tokenizer.
        prompt: text; encoder-decoder models answer it, others go on from it.
        max_new_tokens: when to stop if the model does not.
    Returns:
        "text" (the prompt included, where the model goes on from it), "new_tokens", "seconds",
        "weight_bytes" of the model in memory, "device", and what was given.
    Raises:
        InputError: the model does not generate text, or the prompt has no token or too many; and what
            `load` raises.
        ModelError: the folder has no tokenizer.
    """
    tokenizer: Any = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model: Any = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if not model.can_generate():
        raise InputError(f"{path} is a {type(model).__name__}, which does not generate text")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    _check_length(model, encoded["input_ids"].shape[-1], max_new_tokens)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    started = time.perf_counter()
    output = model.generate(
        encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )[0].cpu()
    seconds = time.perf_counter() - started
    # A decoder's output begins with its start token, other models' with the prompt.
    given = 1 if model.config.is_encoder_decoder else encoded["input_ids"].shape[-1]
    return {
        "checkpoint": str(path),
        "prompt": prompt,
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "new_tokens": len(output) - given,
        "seconds": seconds,
        "device": str(model.device),
        "weight_bytes": model.get_memory_footprint(),
    }


def _check_length(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    if prompt_tokens == 0:
        raise InputError("a prompt must hold text, and this one has no token; give some")
    positions = longest_sequence(model)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones must fit the model's "
            f"{positions} positions; shorten the prompt or lower --max-new-tokens"
        )


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return cast("torch.dtype | None", dtype)
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}; choose one")
    return _DTYPES[str(dtype)]
