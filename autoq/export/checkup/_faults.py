"""What is wrong with a checkpoint whoever reads it: its manifests, its tensors, and both together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from autoq.errors import ExportError
from autoq.export._layouts import LAYOUTS, TensorRule
from autoq.export.checkup._cache import (
    BESIDE_PROJECTIONS,
    KV_SCALES,
    stated_cache,
    stated_in,
)
from autoq.export.checkup._files import StoredTensor, StoredTensors
from autoq.export.checkup._fused import exclusion_faults, fusion_faults
from autoq.export.checkup._groups import pattern_faults
from autoq.export.checkup._inputs import turned_input_scales
from autoq.export.checkup._manifest import Declared, Manifest
from autoq.export.checkup._modules import StoredModule
from autoq.formats import FORMATS, Container, FormatName, WeightElement

_COMPRESSED = "compressed"
_CODES_UNDER_TOP = 6.0 * 448.0
"""Of NVFP4, the largest code under the largest block scale."""
_LARGEST_WEIGHT = 65504.0
"""Float16's largest number, which no matrix of a language model comes near."""


def faults(
    manifest: Manifest, tensors: StoredTensors, modules: Mapping[str, StoredModule]
) -> Iterator[str]:
    """Everything that is wrong, a line each, by name."""
    yield from _manifest_faults(manifest, modules)
    if manifest.container is Container.COMPRESSED_TENSORS and not manifest.is_fp8:
        yield from pattern_faults(manifest, tensors, modules)
    yield from _cache_faults(manifest, tensors)
    for module in modules.values():
        try:
            yield from _module_faults(manifest, module, tensors)
        except ExportError as error:
            yield str(error)
    yield from turned_input_scales(manifest, modules, tensors)
    yield from fusion_faults(manifest, modules, tensors)
    yield from exclusion_faults(manifest, modules)


def _manifest_faults(manifest: Manifest, modules: Mapping[str, StoredModule]) -> Iterator[str]:
    if manifest.is_fp8:
        return
    if manifest.container is Container.COMPRESSED_TENSORS:
        if manifest.flat.get("quantization_status") != _COMPRESSED:
            yield "quantization_status must be 'compressed', or transformers reads garbage"
        for target in _nobodys(manifest.plain_targets, modules):
            yield (
                f"a config group names {target}, which has no tensors: TensorRT-LLM stops at it, "
                "and other engines pass over it"
            )
        return
    nested = manifest.nested
    if nested is None:
        yield "hf_quant_config.json is missing, and TensorRT-LLM reads it first"
    else:
        for ours, theirs in (
            ("quant_algo", "quant_algo"),
            ("ignore", "exclude_modules"),
            ("quantized_layers", "quantized_layers"),
        ):
            if not _alike(manifest.flat.get(ours), nested.get(theirs)):
                yield (
                    f"config.json's {ours} and hf_quant_config.json's {theirs} differ: TensorRT-LLM "
                    "believes the second, other engines the first"
                )
        cache, nested_cache = stated_in(manifest.flat), stated_in(nested)
        if cache != nested_cache:
            yield (
                f"config.json states {cache or 'no'} key/value cache, and hf_quant_config.json "
                f"{nested_cache or 'none'}: TensorRT-LLM believes the second, other engines the first"
            )
    for name in _nobodys(manifest.layers, modules):
        yield f"quantized_layers names {name}, which has no tensors"


def _nobodys(names: Iterable[str], modules: Mapping[str, StoredModule]) -> Iterator[str]:
    """Those that name neither a module nor what engines make of several."""
    leaves: dict[str, set[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        leaves.setdefault(parent, set()).add(leaf)
    inside = "\n" + "\n".join(modules)
    for name in names:
        if name not in modules and not _is_alias(name, inside, leaves):
            yield name


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return bool((one or None) == (other or None))


def _is_alias(name: str, inside: str, leaves: Mapping[str, set[str]]) -> bool:
    """Whether engines use the name for something that is made of the checkpoint's modules."""
    if f"\n{name}." in inside:
        return True
    parent, _, leaf = name.rpartition(".")
    beside = leaves.get(parent, set())
    parts = {"qkv_proj": {"q_proj", "query"}, "gate_up_proj": {"gate_proj"}}.get(leaf, set())
    wholes = {"qkv_proj"} if leaf in {"q_proj", "k_proj", "v_proj"} else {"gate_up_proj"}
    return bool(parts & beside) or bool(wholes & beside)


def _cache_faults(manifest: Manifest, tensors: StoredTensors) -> Iterator[str]:
    promised = stated_cache(manifest)
    stored = [name for name in tensors if name.endswith(KV_SCALES)]
    if promised and not stored:
        yield (
            "the manifest promises a quantised key/value cache, and there are no k_scale and "
            "v_scale: transformers computes garbage, other engines take 1"
        )
    if stored and not promised:
        yield f"{stored[0]} is a scale of a quantised key/value cache, which no manifest promises"
    misplaced = [name for name in stored if name.endswith(BESIDE_PROJECTIONS)]
    is_theirs = manifest.container is Container.COMPRESSED_TENSORS and not manifest.is_fp8
    if promised and misplaced and is_theirs:
        attention, _, leaf = misplaced[0].rsplit(".", 2)
        yield (
            f"{misplaced[0]} is modelopt's name: transformers looks for {attention}.{leaf}, takes 0 "
            "for what it does not find and computes garbage"
        )
    for name in stored:
        if not _is_positive(tensors.read(name)):
            yield f"{name} must be positive and finite everywhere, and is not"


def _module_faults(
    manifest: Manifest, module: StoredModule, tensors: StoredTensors
) -> Iterator[str]:
    declared = manifest.declared(module.name)
    if declared is None:
        if module.is_quantized:
            yield (
                f"{module.name} has {', '.join(sorted(module.tensors))}, and the manifest says that "
                "it is not quantised"
            )
        return
    if not module.is_quantized:
        yield f"the manifest says {declared.label} of {module.name}, whose weight is not quantised"
        return
    if declared.format is None:
        yield from _scale_faults(module, tensors)
        return
    yield from _layout_faults(manifest.container, module, declared, tensors)


def _scale_faults(module: StoredModule, tensors: StoredTensors) -> Iterator[str]:
    """Of a format that autoq does not have: scales are positive whatever it is."""
    for stored in module.tensors.values():
        is_scale = "scale" in stored.name.rpartition(".")[2] and stored.dtype.is_floating_point
        if is_scale and not _is_positive(tensors.read(stored.name)):
            yield f"{stored.name} must be positive and finite everywhere, and is not"


def _layout_faults(
    container: Container, module: StoredModule, declared: Declared, tensors: StoredTensors
) -> Iterator[str]:
    assert declared.format is not None
    rules = LAYOUTS[container, declared.format].tensors
    lacking = [
        name for name, rule in rules.items() if name not in module.tensors and not rule.optional
    ]
    if lacking:
        yield f"{module.name} is {declared.label} and lacks {', '.join(lacking)}"
    surplus = [name for name in module.tensors if name not in rules]
    if surplus:
        yield f"{module.name} is {declared.label}, which has no {', '.join(surplus)}"
    shape = module.shape(container, declared.format)
    if shape is None:
        if not lacking:
            yield f"the codes of {module.name} are of no shape that {declared.label} can have"
        return
    for name, rule in rules.items():
        stored = module.tensors.get(name)
        if stored is None:
            continue
        if stored.dtype not in rule.dtypes:
            yield f"{stored.name} must be {_dtypes(rule.dtypes)}, got {_dtypes([stored.dtype])}"
        elif not _fits(stored.shape, rule, shape, container):
            yield f"{stored.name} must have shape {rule.shape(*shape)}, got {stored.shape}"
        elif wrong := _wrong_values(rule, stored, tensors):
            yield f"{stored.name} must {wrong}, and does not"
        elif wrong := _turned_scale(name, declared.format, container, stored, tensors):
            yield wrong
        elif name == "weight_shape" and not _spans(
            got := tensors.read(stored.name).tolist(), shape
        ):
            yield f"{stored.name} must hold {list(shape)}, as the codes do, and holds {got}"


def _wrong_values(rule: TensorRule, stored: StoredTensor, tensors: StoredTensors) -> str | None:
    """What is wrong with a tensor's values; scales, factors and E4M3 codes can have wrong ones."""
    if not (rule.is_scale or rule.is_factor or stored.dtype == torch.float8_e4m3fn):
        return None
    return rule.wrong_values(tensors.read(stored.name))


def _turned_scale(
    name: str, fmt: FormatName, container: Container, stored: StoredTensor, tensors: StoredTensors
) -> str | None:
    """What is wrong with NVFP4's top scale, which one container holds as the other's reciprocal."""
    is_divisor = name == "weight_global_scale"
    if FORMATS[fmt].weight_element is not WeightElement.E2M1 or not (
        is_divisor or name == "weight_scale_2"
    ):
        return None
    scale = float(tensors.read(stored.name))
    largest = _CODES_UNDER_TOP * (1 / scale if is_divisor else scale)
    if largest <= _LARGEST_WEIGHT:
        return None
    return (
        f"{stored.name} is {scale:.3g}, under which weights reach {largest:.3g}, as no model's do: "
        f"it is the reciprocal of what {container} checkpoints hold"
    )


def _spans(declared: list[int], packed: tuple[int, int]) -> bool:
    """Whether a matrix fills its codes; the last of a row's words, of 4 or 8 columns, may not."""
    rows, columns = declared
    return rows == packed[0] and packed[1] - 8 < columns <= packed[1]


def _fits(
    stored: tuple[int, ...], rule: TensorRule, matrix: tuple[int, int], container: Container
) -> bool:
    """Readers of ModelOpt's container take [1] for []; transformers takes neither for the other."""
    if container is Container.MODELOPT and rule.shape(*matrix) == () and stored == (1,):
        return True
    return rule.takes_shape(stored, *matrix)


def _dtypes(dtypes: Any) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _is_positive(values: torch.Tensor) -> bool:
    numbers = values.float()
    return bool((torch.isfinite(numbers) & (numbers > 0)).all())
