"""Small parts of the model that lm-eval calls. Imports transformers, as that module does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from autoq.errors import InputError

DEFAULT_POSITIONS = 2048  # of models that do not say how many they have


class Stops(StoppingCriteria):
    """Ends every row whose new text holds a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._stops = [stop for stop in stops if stop]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows are done, bool [rows]."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :])
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def score(log_probabilities: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Of the last tokens, each predicted from those before it."""
    wanted = torch.tensor(continuation, device=log_probabilities.device)[-len(log_probabilities) :]
    ends = log_probabilities[-len(wanted) :]
    likelihood = float(ends.gather(-1, wanted[:, None]).double().sum())
    return likelihood, bool((ends.argmax(-1) == wanted).all())


def positions(model: nn.Module) -> int:
    """Tokens that the model was made to see at once."""
    config: Any = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return DEFAULT_POSITIONS


def positive(name: str, value: int | str) -> int:
    """The value as a whole number.

    Raises:
        InputError: it is none, or below 1.
    """
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{name} must be a positive whole number, got {value!r}")
    return number
