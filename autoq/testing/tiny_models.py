"""Tiny models of every supported architecture, built in code, with weights fixed by a seed.

Hidden size 128 and intermediate size 256 let every format apply; two layers let depth matter.
Weights are drawn so that activations stay of order one and logits differ between tokens.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autoq.models.loading import quiet_transformers
from autoq.testing._family_settings import (
    FAMILY_SETTINGS,
    MAXIMUM_POSITIONS,
    REMOTE_CODE,
    T5,
    VOCABULARY_SIZE,
    FamilySettings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "MAXIMUM_POSITIONS",
    "TINY_ARCHITECTURES",
    "VOCABULARY_SIZE",
    "make_byte_tokenizer",
    "make_family_model",
    "make_tiny_model",
    "write_family_model",
    "write_tiny_model",
]

_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

# Models that most tests use; the table of families has more, and a smaller T5.
_RECIPES: Mapping[str, FamilySettings] = MappingProxyType(
    {
        **{
            name: FAMILY_SETTINGS[name]
            for name in (
                "llama",
                "qwen2",
                "qwen3",
                "mistral",
                "gemma3",
                "phi3",
                "gpt2",
                "opt",
                "mixtral",
                "qwen3_moe",
                "bert",
            )
        },
        "t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {**T5, "num_layers": 2, "feed_forward_proj": "gated-gelu"},
        ),
    }
)

# Heads tied to the embedding see it through these models' own scaling (Gemma multiplies embeddings,
# T5 divides logits); with other spreads they would copy their input, or predict nothing at all.
_TOKEN_EMBEDDING_SPREAD = MappingProxyType({"gemma": 0.06, "t5": 0.7})
_DEFAULT_EMBEDDING_SPREAD = 0.18

TINY_ARCHITECTURES: tuple[str, ...] = tuple(_RECIPES)
"""The names that `make_tiny_model` and `write_tiny_model` know."""


def make_tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a tiny model in eval mode on the CPU; equal arguments give equal weights.

    Args:
        name: one of `TINY_ARCHITECTURES`.
        seed: chooses the weights.
        dtype: dtype of the parameters; the same float32 draw is rounded to it.
    """
    return _made(_RECIPES[name], seed, dtype)


def make_family_model(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """As `make_tiny_model`, for a family of `autoq.testing.architectures.FAMILIES`."""
    if family not in REMOTE_CODE:
        return _made(FAMILY_SETTINGS[family], seed, dtype)
    return _made(FAMILY_SETTINGS[family], seed, dtype, code=_remote_module(family))


def _remote_module(family: str) -> ModuleType:
    return importlib.import_module(f"autoq.testing.remote_code.{REMOTE_CODE[family]}")


def _made(
    recipe: FamilySettings, seed: int, dtype: torch.dtype, code: ModuleType | None = None
) -> nn.Module:
    import transformers

    classes = transformers if code is None else code
    class_name, config_name, settings = recipe
    config = getattr(classes, config_name)(**settings, experts_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        model: Any = getattr(classes, class_name)(config)
    _draw_weights(model, seed, _embedding_spread(class_name))
    for parameter in model.parameters():
        # Buffers stay as they are: loading keeps the frequencies of rotary embeddings in float32.
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    built: nn.Module = model.eval()
    return built


def _embedding_spread(class_name: str) -> float:
    found = (
        spread
        for beginning, spread in _TOKEN_EMBEDDING_SPREAD.items()
        if class_name.casefold().startswith(beginning)
    )
    return next(found, _DEFAULT_EMBEDDING_SPREAD)


def write_tiny_model(name: str, folder: Path | str, seed: int = 0) -> Path:
    """Save a tiny bfloat16 model and its byte-level tokenizer into `folder`; returns the folder."""
    return _written(make_tiny_model(name, seed), Path(folder))


def write_family_model(family: str, folder: Path | str, seed: int = 0) -> Path:
    """As `write_tiny_model`, for a family of `autoq.testing.architectures.FAMILIES`."""
    target = _written(make_family_model(family, seed), Path(folder))
    if family in REMOTE_CODE:
        _add_remote_code(family, target)
    return target


def _add_remote_code(family: str, folder: Path) -> None:
    """Put the model's code into its folder, and say in config.json where it is."""
    module = _remote_module(family)
    shutil.copyfile(str(module.__file__), folder / f"{REMOTE_CODE[family]}.py")
    class_name, config_name, _ = FAMILY_SETTINGS[family]
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{REMOTE_CODE[family]}.{config_name}",
        "AutoModelForCausalLM": f"{REMOTE_CODE[family]}.{class_name}",
    }
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _written(model: Any, target: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(target)
    make_byte_tokenizer().save_pretrained(target)
    return target


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte after four special tokens: 260 ids, nothing unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer_class: Any = PreTrainedTokenizerFast  # its constructor is not annotated
    built: PreTrainedTokenizerFast = tokenizer_class(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAXIMUM_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    return built


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int, embedding_spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()  # a tied head must not redraw the embedding
    for module in model.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            centre, spread = _distribution(module, parameter_name, parameter, embedding_spread)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(centre + spread * noise)


def _distribution(
    module: nn.Module, name: str, parameter: nn.Parameter, embedding_spread: float
) -> tuple[float, float]:
    """Mean and standard deviation to draw a parameter from."""
    if parameter.ndim == 1:
        # Gemma stores norm weights as an offset from one.
        is_scale = name == "weight" and not type(module).__name__.startswith("Gemma")
        return (1.0 if is_scale else 0.0), 0.1
    if isinstance(module, nn.Embedding):
        is_of_tokens = module.num_embeddings == VOCABULARY_SIZE
        # Positions and segments whisper, or all tokens would look alike.
        return 0.0, embedding_spread if is_of_tokens else embedding_spread / 4
    stored_in_out = type(module).__name__ == "Conv1D"
    in_features = parameter.shape[0] if stored_in_out else parameter.shape[-1]
    return 0.0, _gain(module, parameter) / math.sqrt(in_features)


def _gain(module: nn.Module, parameter: nn.Parameter) -> float:
    """Heads and routers speak louder, so that their choices are clear."""
    is_head = isinstance(module, nn.Linear) and parameter.shape[0] == VOCABULARY_SIZE
    is_router = parameter.ndim == 2 and type(module).__name__.endswith("Router")
    return 2.0 if is_head or is_router else 1.0
