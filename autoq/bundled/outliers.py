"""Make a model harder to quantise without changing what it computes.

Some channels of the norms in front of linear layers are multiplied by a large factor and the
matching columns of those linear layers are divided by it. The product stays the same, but the
activations between them get the outliers that large models show.

`python -m autoq.bundled.outliers MODEL_DIR OUT_DIR` writes the hard variant of a stored model.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

_CHANNELS_PER_OUTLIER = 64
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def add_activation_outliers(
    model: nn.Module,
    channels_per_norm: int | None = None,
    seed: int = 0,
    low: float = 20.0,
    high: float = 60.0,
) -> None:
    """Give each norm of a Llama-like model outlier channels, in place, keeping its function.

    `channels_per_norm` defaults to one channel in 64. The factors are drawn evenly from `low` to
    `high`. The mathematics is done in float32; parameters keep their type, so in a narrow type
    the function is kept up to the rounding of that type.

    Raises ValueError, before anything is changed, if the model is not built like Llama.
    """
    import torch

    if not 0.0 < low <= high:
        raise ValueError(f"factors must satisfy 0 < low <= high, got low={low} and high={high}")
    pairs = [pair for block in _blocks(model) for pair in _norms_and_readers(block)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, readers in pairs:
            factors = _factors(norm.numel(), channels_per_norm, low, high, generator)
            _multiply(norm, factors)
            for reader in readers:
                _multiply(reader, 1.0 / factors)


def _blocks(model: nn.Module) -> list[nn.Module]:
    layers = getattr(getattr(model, "model", model), "layers", None)
    if layers is None or len(layers) == 0:
        raise ValueError(f"{type(model).__name__} has no list of blocks at model.layers")
    return list(layers)


def _norms_and_readers(block: nn.Module) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    if hasattr(block, "pre_feedforward_layernorm"):
        raise ValueError("post_attention_layernorm does not feed the mlp in this model")
    for norm_name, reader_names in _READERS.items():
        norm = _submodule(block, norm_name)
        _check_plain_norm(norm, norm_name)
        scale = _weight(norm, norm_name)
        readers = [_weight(_submodule(block, name), name) for name in reader_names]
        for name, reader in zip(reader_names, readers, strict=True):
            if reader.dim() != 2 or reader.shape[1] != scale.numel():
                raise ValueError(f"{name} does not read the {scale.numel()} channels of its norm")
        yield scale, readers


def _submodule(block: nn.Module, name: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(block).__name__} is not Llama-like: no {name}") from error


def _weight(module: nn.Module, name: str) -> torch.Tensor:
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise ValueError(f"{name} has no floating-point weight")
    return weight


def _check_plain_norm(norm: nn.Module, name: str) -> None:
    """A norm must be proportional to its weight; norms with a bias or with 1 + weight are not."""
    import torch

    weight = _weight(norm, name)
    with torch.no_grad():
        original = weight.clone()
        weight.zero_()
        silent = norm(torch.ones(1, 1, weight.numel(), dtype=weight.dtype, device=weight.device))
        weight.copy_(original)
    if silent.abs().max().item() != 0.0:
        raise ValueError(f"{name} ({type(norm).__name__}) is not proportional to its weight")


def _factors(
    channels: int, outliers: int | None, low: float, high: float, generator: torch.Generator
) -> torch.Tensor:
    import torch

    count = max(1, channels // _CHANNELS_PER_OUTLIER) if outliers is None else outliers
    if not 0 <= count <= channels:
        raise ValueError(f"cannot choose {count} of {channels} channels")
    factors = torch.ones(channels)
    chosen = torch.randperm(channels, generator=generator)[:count]
    factors[chosen] = low + (high - low) * torch.rand(count, generator=generator)
    return factors


def _multiply(weight: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply the last dimension of a weight by factors, in float32."""
    weight.copy_(weight.float() * factors.to(weight.device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a variant of a model with outliers.")
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL_DIR")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT_DIR")
    parser.add_argument("--channels-per-norm", type=int, help="default: one in 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--low", type=float, default=20.0)
    parser.add_argument("--high", type=float, default=60.0)
    parser.add_argument("--dtype", default="auto", help="number type to store; auto keeps it")
    return parser.parse_args()


def main() -> None:
    """Write the hard variant of a stored model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = _arguments()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    add_activation_outliers(
        model, arguments.channels_per_norm, arguments.seed, arguments.low, arguments.high
    )
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
