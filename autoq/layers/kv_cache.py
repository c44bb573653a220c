"""The key/value cache in a format: keys after rotary embedding, and values, as they are cached.

Every decoder of transformers hands both to its cache's `update`, whichever attention kernel then
reads them. A stand-in for the cache, put in the place of the real one or of none, sees what is
written, and may put something else there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.formats import NONE, FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.kernels import fp8, nvfp4
from autoq.kernels._checks import checked_amax
from autoq.kernels._torch.chunks import scale_from_amax
from autoq.layers.cached_layer import CachedLayer
from autoq.models.forward import is_causal, text_config

CacheHandler: TypeAlias = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's name, its keys and its values, each [sequences, heads, tokens, head_dim], and
gives what is cached in their place."""

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


def cache_scale(fmt: FormatName, amax: float) -> Tensor:
    """The scale of a layer's keys, or of its values, as checkpoints store it.

    Args:
        fmt: one of `KV_CACHE_FORMATS`.
        amax: largest magnitude in calibration.
    Returns:
        float32 scalar: amax / 448, for int8 amax / 127; 1 where amax is 0.
    Raises:
        InputError: amax is negative, NaN or infinite.
        UnknownNameError: nothing has the format's name.
    """
    return scale_from_amax(checked_amax(amax), KV_CACHE_FORMATS[fmt].stored_divisor)


def fake_quantize_cache(x: Tensor, fmt: FormatName, scale: Tensor) -> Tensor:
    """Keys or values as they come out of a cache in a format.

    fp8: e4m3(x / scale) * scale. int8: round(x / scale) * scale, codes from -128 to 127. nvfp4: E2M1
    under E4M3 scales of 16 elements each, found in x itself, under scale / 6. All arithmetic is
    float32; rounding is to nearest, ties to even; what the scale does not reach saturates, but for
    nvfp4 only as far as block scales do.
    Sources: as `autoq.kernels.fp8` and `autoq.kernels.nvfp4`; ModelOpt quantises the operands of the
    attention's products by the same rules.

    Args:
        x: float32, bfloat16 or float16 [..., head_dim].
        fmt: one of `KV_CACHE_FORMATS`.
        scale: float32 scalar from `cache_scale`, or from a checkpoint.
    Returns:
        The shape and dtype of `x`; no gradient flows through it.
    Raises:
        InputError: nvfp4 does not fit head_dim.
        UnknownNameError: nothing has the format's name.
    """
    entry = KV_CACHE_FORMATS[fmt]
    x, scale = x.detach(), scale.to(x.device)
    if fmt == NONE:
        return x
    if fmt == "fp8":
        return fp8.fake_quantize(x, scale)
    if fmt == "nvfp4":
        return nvfp4.fake_quantize(x, scale / (entry.largest_code / entry.stored_divisor))
    return (x.float() / scale).round_().clamp_(-128, 127).mul_(scale).to(x.dtype)


@dataclass(frozen=True, slots=True)
class CacheCoding:
    """A format, and the scales of one layer's keys and values as checkpoints store them."""

    format: FormatName
    key_scale: Tensor  # float32 scalar
    value_scale: Tensor

    @classmethod
    def of(cls, layer: CachedLayer, fmt: FormatName) -> CacheCoding:
        """What calibration makes of a layer."""
        return cls(fmt, cache_scale(fmt, layer.key_amax), cache_scale(fmt, layer.value_amax))


class CacheSimulation:
    """Quantises and dequantises what layers write into their caches, until it is removed."""

    def __init__(self, model: nn.Module, codings: Mapping[str, CacheCoding]) -> None:
        """
        Args:
            codings: of layers by name; others are left alone.
        """
        self._model = model
        self._codings = {name: coding for name, coding in codings.items() if coding.format != NONE}
        self._remove: Callable[[], None] | None = None

    @classmethod
    def calibrated(
        cls, model: nn.Module, formats: Mapping[str, FormatName], layers: Iterable[CachedLayer]
    ) -> CacheSimulation:
        """As calibration found the layers.

        Args:
            formats: of layers by name; those that are not named, or "none", are left alone.
            layers: with their calibrated magnitudes, at least those that are named.
        """
        known = {layer.name: layer for layer in layers}
        return cls(model, {name: CacheCoding.of(known[name], fmt) for name, fmt in formats.items()})

    def install(self) -> None:
        """Begin; nothing happens where it has begun."""
        if self._remove is None:
            self._remove = watch_cache(self._model, self._codings, self._quantized)

    def remove(self) -> None:
        """The model caches what it computes again."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    def _quantized(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        coding = self._codings[name]
        return (
            fake_quantize_cache(keys, coding.format, coding.key_scale),
            fake_quantize_cache(values, coding.format, coding.value_scale),
        )


def watch_cache(
    model: nn.Module, names: Iterable[str], handler: CacheHandler
) -> Callable[[], None]:
    """Put a handler between attentions and their caches.

    Args:
        names: paths of attention modules, from `cached_layers`.
    Returns:
        What takes it away again.
    """
    handles = []
    for name in names:
        module = model.get_submodule(name)
        argument = _cache_argument(module)
        assert argument is not None  # it is one of `attention_modules`
        hook = partial(_put_stand_in, argument, partial(handler, name))
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def watched_cache(model: nn.Module, names: Iterable[str], handler: CacheHandler) -> Iterator[None]:
    """As `watch_cache`, for as long as the context lasts."""
    remove = watch_cache(model, names, handler)
    try:
        yield
    finally:
        remove()


def cached_layers(model: nn.Module, run: Callable[[], Any]) -> tuple[CachedLayer, ...]:
    """The layers that cache keys and values, in the order in which they run.

    Layers without a cache of their own, such as those that mix tokens by other means or read another
    layer's keys, are not among them.

    Args:
        run: runs the model on some small input, one or more sequences.
    Raises:
        ModelError: the model has none that can be seen, or caches something else; says why.
    """
    refuse_other_caches(model)
    found: dict[str, CachedLayer] = {}

    def record(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found[name] = layer_of(model, name, keys, values)
        return keys, values

    with watched_cache(model, attention_modules(model), record), torch.no_grad():
        run()
    if not found:
        raise unseen_cache(model)
    return tuple(found.values())


def unseen_cache(model: nn.Module) -> ModelError:
    """That nothing a model caches can be seen."""
    return ModelError(
        f"{type(model).__name__} caches no keys and values where they can be seen, so their "
        "format cannot be chosen; leave out --kv-formats"
    )


def attention_modules(model: nn.Module) -> list[str]:
    """Paths of the innermost modules that are given the cache and know their layer's number.

    Those with a convolution keep their own state in it, and no keys.
    """
    taking = [
        path
        for path, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and _cache_argument(module) is not None
        and not any(isinstance(part, nn.Conv1d) for part in module.modules())
    ]
    return [path for path in taking if not any(other.startswith(f"{path}.") for other in taking)]


def _cache_argument(module: nn.Module) -> str | None:
    """Name of the argument in which a module's forward takes the cache."""
    known = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in known), None)


def _put_stand_in(
    argument: str,
    show: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the cache, wherever it stands among the arguments, gets a stand-in."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    stand_in = _StandIn(bound.arguments.get(argument), show)
    place = list(bound.signature.parameters).index(argument)
    if place < len(args):
        return (*args[:place], stand_in, *args[place + 1 :]), kwargs
    return args, {**kwargs, argument: stand_in}


class _StandIn:
    """A cache that shows what is written; with no real one behind it, it keeps nothing."""

    def __init__(self, cache: Any, show: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._cache = cache
        self._show = show

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self._show(key_states, value_states)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        cache = self.__dict__["_cache"]
        if cache is None:
            raise AttributeError(name)
        return getattr(cache, name)


def refuse_other_caches(model: nn.Module) -> None:
    """
    Raises:
        ModelError: the model keeps no cache of keys and values, or another one; says which.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"the key/value cache of decoders alone has a format to choose, and {name} has an "
            "encoder, too, whose keys and values are cached apart; leave out --kv-formats"
        )
    if not is_causal(model):
        raise ModelError(
            f"a key/value cache is kept by models that continue text, and {name} does not; leave out "
            "--kv-formats"
        )
    if getattr(text_config(model), "kv_lora_rank", None) is not None:
        raise ModelError(
            f"engines cache one latent vector per token of {name}, and no keys and values, so formats "
            "of those cannot be tried; leave out --kv-formats"
        )


def layer_of(model: nn.Module, name: str, keys: Tensor, values: Tensor) -> CachedLayer:
    """The shape of a layer's cache, from keys and values [sequences, heads, tokens, head_dim].

    Raises:
        ModelError: they have another shape.
    """
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[2] != values.shape[2]:
        raise ModelError(
            f"{name} of {type(model).__name__} must cache keys and values [sequences, heads, tokens, "
            f"head_dim], and caches {tuple(keys.shape)} and {tuple(values.shape)}; leave out "
            "--kv-formats"
        )
    return CachedLayer(
        name=name,
        key_heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_heads=values.shape[1],
        value_dim=values.shape[3],
    )
