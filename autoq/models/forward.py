"""One way to call every kind of model, and what its output means."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.models._types import ModelMap

OutputKind = Literal["logits", "hidden"]


def forward_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
) -> Tensor:
    """Run the model on token ids.

    Causal and masked models see `input_ids` as they are; encoder-decoder models get them on both
    sides, on the decoder's shifted right by its start token, so position t predicts token t.

    Args:
        model: a transformers model.
        input_ids: int64 [batch, tokens], on the model's device.
        attention_mask: int64 [batch, tokens], 0 for padding; None: there is none.
        decoder_input_ids: int64 [batch, decoder tokens], what the decoder of an encoder-decoder
            model reads instead; None of all other models.
    Returns:
        Logits [batch, tokens, vocabulary], or for models without an output head the last hidden
        state [batch, tokens, hidden]; in the model's dtype. Tokens are the decoder's where there is
        one.
    Raises:
        ModelError: the model gives neither for every token, or takes no token ids.
    """
    arguments = _arguments(model, input_ids)
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if decoder_input_ids is not None:
        arguments["decoder_input_ids"] = decoder_input_ids
    return _token_output(model, model(**arguments))


def forward_layers(model: nn.Module, input_ids: Tensor) -> None:
    """Run the model on token ids for what its layers see; its output is not asked for.

    Every layer in a block sees what it sees in `forward_logits`. What stands behind the blocks, the
    output head and in BERT's kind a dense layer before it, sees the last token only, in models that
    know how to: with a large vocabulary the head takes a fifth of a small model's time, and its
    logits more memory than all else.

    Args and errors are those of `forward_logits`.
    """
    arguments = _arguments(model, input_ids)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    model(**arguments)


def layers_see_all(model_map: ModelMap) -> bool:
    """Whether every searched layer sees in `forward_layers` what it sees in `forward_logits`."""
    inside = tuple(f"{path}." for path in model_map.blocks)
    return all(slot.module.startswith(inside) for slot in model_map.slots.values())


def _arguments(model: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    refuse_other_inputs(model)
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if is_encoder_decoder(model):
        arguments["decoder_input_ids"] = _shift_right(model, input_ids)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return arguments


def refuse_other_inputs(model: nn.Module) -> None:
    """Refuse models that read something else than token ids, as Whisper reads sounds.

    Raises:
        ModelError: names what the model takes, and the way to give it.
    """
    name = getattr(model, "main_input_name", "input_ids")
    if name != "input_ids":
        raise ModelError(
            f"a model is searched on token ids, and {type(model).__name__} takes {name}; give "
            "autoq.auto_quantize batches of them, and a forward_step that runs the model on one"
        )


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None if the model has no configuration."""
    config: Any = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return config if getter is None else getter(decoder=True)


def output_kind(model: nn.Module) -> OutputKind:
    """Whether `forward_logits` gives logits or hidden states."""
    return "hidden" if _output_head(model) is None else "logits"


def is_causal(model: nn.Module) -> bool:
    """Whether the logits at a position predict the next token, as perplexity needs."""
    if is_encoder_decoder(model) or output_kind(model) == "hidden":
        return False
    name = type(model).__name__
    return name in _causal_class_names() or name.endswith(("ForCausalLM", "LMHeadModel"))


def _causal_class_names() -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    # Without a picture, a model that tells of pictures continues text.
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return frozenset(name for table in tables for name in table.values())


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads two sequences, one of them with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shift_right(model: nn.Module, input_ids: Tensor) -> Tensor:
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = config.pad_token_id
    if start is None:
        raise ModelError(
            "an encoder-decoder model needs decoder_start_token_id or pad_token_id in config.json, "
            f"and {type(model).__name__} has neither; add one"
        )
    first = torch.full_like(input_ids[:, :1], int(start))
    return torch.cat([first, input_ids[:, :-1]], dim=1)


def _token_output(model: nn.Module, output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        values = getattr(output, name, None)
        if isinstance(values, Tensor) and values.ndim == 3:
            return values
    raise ModelError(
        "a model must give logits or hidden states for every token, and "
        f"{type(model).__name__} does not; choose a language model or its base model"
    )
