"""What each engine makes of a checkpoint's key/value cache: what it reads of it, and where from.

vLLM 0.33 and SGLang 0.5.23: their own code, asked on a CPU (`tests/export/engine_golden`).
transformers 5.23 was executed; TensorRT-LLM of about 1.2 was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoq.errors import ExportError
from autoq.export.checkup._manifest import Manifest
from autoq.export.checkup._outcome import (
    GARBAGE,
    REFUSES,
    SILENT,
    UNQUANTIZED,
    Outcome,
    outcomes,
)
from autoq.formats import ENGINES, Container, FormatName, Target
from autoq.formats.kv_cache_support import kv_cache_support

KV_SCALES = (".k_scale", ".v_scale")
BESIDE_PROJECTIONS = (".k_proj.k_scale", ".v_proj.v_scale")

_FP8, _INT8, _NVFP4 = FormatName("fp8"), FormatName("int8"), FormatName("nvfp4")
_OF_NUMBERS = {("float", 8): _FP8, ("int", 8): _INT8, ("float", 4): _NVFP4}
_BY_NAME = {"FP8": _FP8, "INT8": _INT8, "NVFP4": _NVFP4}

_SCHEME, _NAME = "kv_cache_scheme", "kv_cache_quant_algo"
_OF_ONE = "under a scale of 1 and not under the stored ones, which it skips without a word"


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The key/value cache that a checkpoint states."""

    stored: str  # the format, or the manifest's own words
    outcomes: Mapping[str, Outcome]  # by engine, or by the target


@dataclass(frozen=True, slots=True)
class _Read:
    """What an engine takes a checkpoint's cache for."""

    format: FormatName | None  # None: the model's dtype
    remark: str = ""
    is_silent: bool = True  # of what it does not read it says nothing


def cache_report(
    manifest: Manifest, names: tuple[str, ...], target: Target | None
) -> CacheReport | None:
    """What is done with the cache; None where no manifest states one.

    Args:
        names: of all tensors.
        target: where it is to run; None looks at every engine on all its hardware.
    """
    stored = stated_cache(manifest)
    if stored is None:
        return None

    def on(where: Target) -> Outcome:
        return _on(where, manifest, names)

    return CacheReport(stored, outcomes(tuple(ENGINES.values()), target, on))


def stated_cache(manifest: Manifest) -> str | None:
    """What either manifest says of the cache, as a format where it is one; None if nothing."""
    return stated_in(manifest.flat) or stated_in(manifest.nested or {})


def stated_in(part: Mapping[str, Any]) -> str | None:
    """What one manifest says of the cache."""
    scheme, name = part.get(_SCHEME), part.get(_NAME)
    if not scheme and not name:
        return None
    given = _numbers(scheme) if isinstance(scheme, Mapping) else _named(scheme or name)
    return str(given or scheme or name)


def _on(target: Target, manifest: Manifest, names: tuple[str, ...]) -> Outcome:
    engine = target.engine
    try:
        read = _READERS[engine.name](manifest)
    except ExportError as error:
        return Outcome(REFUSES, str(error), False)
    if read.format is None:
        return Outcome(SILENT if read.is_silent else UNQUANTIZED, read.remark, False)
    if engine.name == "transformers" and (reason := _unfound(names)) is not None:
        return Outcome(GARBAGE, reason, False)
    record = kv_cache_support(target, manifest.container, read.format)
    if not record.verdict.runs:
        return Outcome(REFUSES, record.reason, False)
    return Outcome(record.verdict.value, read.remark or record.reason, True)


def _unfound(names: tuple[str, ...]) -> str | None:
    """Why transformers finds no scales; it takes 0 for them."""
    found = [name for name in names if name.endswith(KV_SCALES)]
    if not found:
        return "transformers takes 0 for scales that are not stored"
    if any(name.endswith(BESIDE_PROJECTIONS) for name in found):
        return f"transformers does not look for {found[0]}, and takes 0 for the scale"
    return None


def _vllm(manifest: Manifest) -> _Read:
    scheme = manifest.flat.get(_SCHEME)
    if manifest.is_fp8:
        return _Read(None, "vLLM reads no key/value cache from fp8 checkpoints")
    if manifest.container is Container.COMPRESSED_TENSORS:
        if _is_static_fp8(scheme, ("tensor", "attn_head")):
            return _Read(_FP8)
        raise ExportError("vLLM stops at a key/value cache that is not static, symmetric FP8")
    if isinstance(scheme, Mapping):
        found = _numbers(scheme)
        if found == _FP8 and scheme.get("dynamic") is not False:
            found = None
    else:
        found = _named(scheme or manifest.flat.get(_NAME))
    if found not in (_FP8, _NVFP4):
        reason = "vLLM takes FP8 that is said not to be dynamic, and NVFP4; it warns of others"
        return _Read(None, reason, is_silent=False)
    is_of_one = manifest.is_mixed and not isinstance(scheme, Mapping) and not _is_nested(manifest)
    return _Read(found, f"kept so, but {_OF_ONE}" if is_of_one else "")


def _sglang(manifest: Manifest) -> _Read:
    flat = manifest.flat
    scheme = flat.get(_SCHEME)
    if manifest.container is Container.COMPRESSED_TENSORS and not manifest.is_fp8:
        if _is_static_fp8(scheme, ("tensor",)):
            return _Read(_FP8)
        reason = (
            "SGLang takes static, symmetric FP8 alone, one scale for a tensor; it warns of others"
        )
        return _Read(None, reason, is_silent=False)
    is_scheme_read = not manifest.is_fp8
    is_name_read = isinstance(scheme, str) and "NVFP4" in manifest.algorithm
    if is_scheme_read and isinstance(scheme, Mapping):
        found = _numbers(scheme)
    elif manifest.is_mixed and _SCHEME not in flat and _NAME not in flat:
        found = _named((manifest.nested or {}).get(_NAME))
    else:
        found = _named(scheme if is_name_read else flat.get(_NAME))
    if found == _FP8:
        return _Read(_FP8)
    where = f" as {_NAME} in fp8 checkpoints" if manifest.is_fp8 else ""
    return _Read(None, f"SGLang takes FP8 alone{where}, and says nothing of others")


def _tensorrt(manifest: Manifest) -> _Read:
    if manifest.is_fp8:
        raise ExportError(
            "whether TensorRT-LLM of about 1.2 takes a key/value cache from fp8 checkpoints was not "
            "looked into"
        )
    if manifest.container is Container.COMPRESSED_TENSORS:
        return _Read(_numbers(manifest.flat.get(_SCHEME)) or _FP8)
    if manifest.nested is not None:
        found, where = _named(manifest.nested.get(_NAME)), f"{_NAME} in hf_quant_config.json"
    else:
        found = _numbers(manifest.flat.get(_SCHEME))
        where = f"{_SCHEME} where there is no hf_quant_config.json"
    return _Read(found, "" if found else f"TensorRT-LLM looks for {where}")


def _transformers(manifest: Manifest) -> _Read:
    if manifest.container is Container.MODELOPT:
        return _Read(None, "transformers has no reader of modelopt checkpoints")
    if manifest.is_fp8:
        return _Read(None, "transformers reads no key/value cache from fp8 checkpoints")
    found = _numbers(manifest.flat.get(_SCHEME))
    if found is None:
        raise ExportError("autoq's tables do not have this key/value cache in transformers")
    return _Read(found)


_READERS: Mapping[str, Callable[[Manifest], _Read]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt,
    "transformers": _transformers,
}


def _is_nested(manifest: Manifest) -> bool:
    """Whether config.json says nothing, and hf_quant_config.json is all there is."""
    return not isinstance(manifest.config.get("quantization_config"), Mapping)


def _numbers(scheme: Any) -> FormatName | None:
    bits = scheme.get("num_bits") if isinstance(scheme, Mapping) else None
    if not isinstance(bits, int):
        return None
    return _OF_NUMBERS.get((str(scheme.get("type")), bits))


def _named(name: Any) -> FormatName | None:
    return _BY_NAME.get(str(name).upper())


def _is_static_fp8(scheme: Any, strategies: tuple[str, ...]) -> bool:
    return (
        _numbers(scheme) == _FP8
        and scheme.get("strategy") in strategies
        and scheme.get("symmetric", True) is True
        and not scheme.get("dynamic", False)
    )
