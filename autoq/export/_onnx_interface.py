"""What an ONNX graph takes and gives, and how the model is called for it: three kinds of graph.

Of token ids alone; of token ids with the keys and values of the tokens before them, which the graph
gives back with those of its own tokens; and of an encoder's token ids with a decoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.models.forward import (
    forward_logits,
    is_causal,
    is_encoder_decoder,
    output_kind,
    text_config,
)

_EXAMPLE_SHAPE = (2, 8)  # batch, tokens: any that are not 1, which torch takes for a constant
_EXAMPLE_PAST = 5
_EXAMPLE_DECODER = 6
_IDS, _MASK, _DECODER_IDS = "input_ids", "attention_mask", "decoder_input_ids"

_PROBE_SHAPES = ((1, 16), (3, 7))
"""Batch and tokens: neither is what the graph was traced with, so that it has to be dynamic."""
_PROBE_DECODERS = (1, 9)
"""The decoder's tokens beside them: a first one, and more than the encoder has."""


@dataclass(frozen=True)
class Interface:
    """Names, examples and sizes of one model's graph; `interface_of` makes it."""

    model: nn.Module
    cached: tuple[tuple[int, int, int], ...] = ()
    """Of each layer's cache heads, features of a key, and of a value; none without a cache."""

    @property
    def with_past(self) -> bool:
        """Whether the graph takes and gives keys and values."""
        return bool(self.cached)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the graph takes, in order."""
        takes_mask = _MASK in inspect.signature(self.model.forward).parameters
        names = (_IDS, *([_MASK] if takes_mask else []))
        decoder = [_DECODER_IDS] if is_encoder_decoder(self.model) else []
        return (*names, *decoder, *self.past)

    @property
    def past(self) -> tuple[str, ...]:
        """Names of the keys and values of earlier tokens, FLOAT [batch, heads, past, features]."""
        return tuple(
            f"past_key_values.{layer}.{part}"
            for layer in range(len(self.cached))
            for part in ("key", "value")
        )

    @property
    def output(self) -> str:
        """Name of what the graph is for."""
        return "logits" if output_kind(self.model) == "logits" else "last_hidden_state"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all that the graph gives, in order."""
        present = (name.replace("past_key_values", "present") for name in self.past)
        return (self.output, *(present if self.with_past else ()))

    @property
    def example(self) -> dict[str, Tensor]:
        """Any values of the inputs, in their order."""
        past = _EXAMPLE_PAST if self.with_past else 0
        return self._feeds(_EXAMPLE_SHAPE, past=past, decoder=_EXAMPLE_DECODER)

    @property
    def dynamic(self) -> dict[str, dict[int, Any]]:
        """Which sizes of the inputs differ from run to run."""
        batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
        # With a cache the mask is as long as cache and tokens together, which no name says.
        mask = torch.export.Dim.AUTO if self.with_past else sequence
        decoder = torch.export.Dim("decoder_sequence")
        known = {
            _IDS: {0: batch, 1: sequence},
            _MASK: {0: batch, 1: mask},
            _DECODER_IDS: {0: batch, 1: decoder},
        }
        return {name: known.get(name, {0: batch, 2: past}) for name in self.inputs}

    @property
    def probes(self) -> list[dict[str, Tensor]]:
        """Values to try the graph with.

        Half of the last of several rows is padding: behind it, or of its earlier tokens the first.
        """
        shapes = zip(_PROBE_SHAPES, _PROBE_DECODERS, strict=True)
        found = [self._feeds(shape, decoder=decoder) for shape, decoder in shapes]
        if self.with_past:
            found.append(self._feeds((2, 1), past=6))  # a token behind others
        return found

    def call(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model gives, by the outputs' names."""
        wrapper = AsGraph(self)
        found = wrapper(*(feeds[name] for name in self.inputs))
        values = (found,) if isinstance(found, Tensor) else found
        return dict(zip(self.outputs, values, strict=True))

    def _feeds(self, shape: tuple[int, int], past: int = 0, decoder: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def ids(rows: int, tokens: int) -> Tensor:
            size = text_config(self.model).vocab_size
            return torch.randint(size, (rows, tokens), generator=generator)

        rows, tokens = shape
        mask = torch.ones((rows, past + tokens), dtype=torch.int64)
        if rows > 1:
            padding = slice(past // 2) if past else slice(tokens // 2, None)
            mask[-1, padding] = 0
        feeds = {_IDS: ids(rows, tokens), _MASK: mask, _DECODER_IDS: ids(rows, decoder)}
        for number, (heads, *features) in enumerate(self.cached):
            for part, size in zip(("key", "value"), features, strict=True):
                values = torch.randn((rows, heads, past, size), generator=generator)
                feeds[f"past_key_values.{number}.{part}"] = values
        return {name: feeds[name] for name in self.inputs}


def interface_of(model: nn.Module, *, with_past: bool = False) -> Interface:
    """What the graph of a model takes and gives.

    Args:
        with_past: take the keys and values of earlier tokens, and give those of all.
    Raises:
        ExportError: with_past is asked for of a model that keeps none by token.
    """
    if not with_past:
        return Interface(model)
    name = type(model).__name__
    if not is_causal(model):
        raise ExportError(
            "a graph with past is of models that continue one sequence, and the model is "
            f"{name}; leave with_past out"
        )
    with torch.no_grad():
        ids = torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64, device=next(model.parameters()).device)
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    sizes = [_cached_sizes(layer) for layer in layers]
    known = tuple(size for size in sizes if size is not None)
    if not known or len(known) < len(sizes):
        raise ExportError(
            f"a graph with past takes keys and values by token, and {name} keeps something else; "
            "leave with_past out"
        )
    return Interface(model, known)


def _cached_sizes(layer: Any) -> tuple[int, int, int] | None:
    """Heads, features of a key, and of a value; None of a layer that keeps something else."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4):
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]


class AsGraph(nn.Module):
    """What is exported: the interface's inputs in its order, and its outputs."""

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.model, self._interface = interface.model, interface

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = dict(zip(self._interface.inputs, values, strict=True))
        past = [named.pop(name) for name in self._interface.past]
        if not past:
            return forward_logits(self.model, **named)
        found = self.model(
            **named, **self._positions(named), past_key_values=_cache_of(past), use_cache=True
        )
        layers = found.past_key_values.layers
        present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return (found.logits, *present)

    def _positions(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions that padding does not count in, int64 [batch, tokens].

        By themselves models count on from the length of the cache, padding included.
        """
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        if not takes_positions or _MASK not in named:
            return {}
        known = (named[_MASK].cumsum(-1) - 1).clamp(min=0)
        return {"position_ids": known[:, -named[_IDS].shape[1] :]}


def _cache_of(past: Sequence[Tensor]) -> Any:
    """transformers' cache with these keys and values, in layers that hold all tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    return cache
