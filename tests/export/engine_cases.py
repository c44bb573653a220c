"""Checkpoints that engines' own code was asked about: every format, all containers, damaged ones.

    python -m tests.export.engine_cases FOLDER

writes them, for `make_engine_golden.py`. The tests write them again, and see by their digests that
the engines were asked about the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from autoq.export import ExportedCache
from autoq.export._kv_cache import manifest_entries
from autoq.export._layouts import LAYOUTS
from autoq.export._types import Spelling
from autoq.export.checkup._files import StoredTensors
from autoq.formats import NONE, FormatName
from autoq.layers import Container
from autoq.layers.cached_layer import CachedLayer
from autoq.models import SlotKind, discover, load_model
from autoq.testing.tiny_models import make_byte_tokenizer, write_family_model
from tests.export.conftest import Planned, Tiny

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
FP8, NVFP4, BLOCKS = FormatName("fp8"), FormatName("nvfp4"), FormatName("fp8_block")
UNIFORM, MIXED, SOURCE = "uniform", "mixed", "source"
ALONE = ", of one format"
"""At the end of a kind: the checkpoint is uniform, and not mixed."""

LLAMA, NARROW = "llama", "narrow"
FAMILIES = (LLAMA, "phi3", "qwen3_moe", "gemma3_vision")
"""Dense; stored fused; experts; inside a model with a vision part."""

LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
Q = f"{LAYER}.self_attn.q_proj"


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint."""

    family: str
    container: Container
    kind: str  # UNIFORM, MIXED or the name of a damage
    format: FormatName
    spelling: Spelling = Spelling.OWN

    def __str__(self) -> str:
        return f"{self.family}/{self.place}/{self.kind}/{self.format}"

    @property
    def place(self) -> str:
        """The container, or the spelling that it is written in."""
        return str(self.container if self.spelling is Spelling.OWN else self.spelling)


def cases() -> tuple[Case, ...]:
    """All of them, in a fixed order."""
    formats = [(container, fmt) for container, fmt in sorted(LAYOUTS)]
    sound = [
        Case(family, container, kind, fmt)
        for family in FAMILIES
        for container, fmt in formats
        for kind in (UNIFORM, MIXED)
    ]
    narrow = [Case(NARROW, container, UNIFORM, BLOCKS) for container in Container]
    whole = [key for key in DAMAGES if key not in CACHES]
    damaged = [Case(LLAMA, container, name, FP8) for container, name in whole]
    caches = [Case(LLAMA, container, name, FP8) for container, name in CACHES]
    return (*sound, *narrow, *damaged, *_of_transformers_fp8(), *caches)


def _of_transformers_fp8() -> Iterator[Case]:
    asked = [(family, kind) for family in FAMILIES for kind in (UNIFORM, MIXED)]
    damaged = [(LLAMA, name) for name in FP8_DAMAGES]
    for family, kind in (*asked, (NARROW, UNIFORM), *damaged):
        yield Case(family, COMPRESSED, kind, BLOCKS, Spelling.TRANSFORMERS_FP8)


def write_case(case: Case, folder: Path) -> Path:
    """The checkpoint, in a folder that is not there yet."""
    loaded = _tiny(case.family)
    kind = UNIFORM if case.kind == UNIFORM or case.kind.endswith(ALONE) else MIXED
    formats = {slot: _format(case, kind, slot, loaded) for slot in loaded.model_map.slots}
    plan = Planned(loaded, case.container, formats, loaded.calibrate(formats))
    cache = _cache(loaded, CACHES.get((case.container, case.kind)))
    path = plan.export(folder, spelling=case.spelling, kv_cache=cache).path
    damage = damage_of(case)
    if damage is not None:
        change_manifests(path, damage)
    if cache is not None and cache.format == NVFP4:
        _take_one_head(path)
    return path


def _cache(loaded: Tiny, fmt: FormatName | None) -> ExportedCache | None:
    """A key/value cache in a format, with scales that differ from 1."""
    if fmt is None:
        return None
    names = [name for name, _ in loaded.model.named_modules() if name.endswith(".self_attn")]
    layers = tuple(
        CachedLayer(
            name=name,
            key_heads=4,
            key_dim=32,
            value_heads=4,
            value_dim=32,
            key_amax=KEYS,
            value_amax=VALUES,
        )
        for name in names
    )
    return ExportedCache(layers, dict.fromkeys(names, fmt))


def _take_one_head(folder: Path) -> None:
    """One head of 128 instead of four of 32: attention that keeps NVFP4 has no smaller ones."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128}
    path.write_text(json.dumps(config))


def damage_of(case: Case) -> Callable[[dict[str, Any]], object] | None:
    """What is done to the manifests of a case, if anything."""
    if case.spelling is Spelling.OWN:
        return DAMAGES.get((case.container, case.kind))
    return FP8_DAMAGES.get(case.kind)


def digest(folder: Path) -> str:
    """Of all that decides what an engine makes of a checkpoint: manifests, and tensors but values."""
    config = json.loads((folder / "config.json").read_text())
    nested = folder / "hf_quant_config.json"
    content = [
        config.get("quantization_config"),
        json.loads(nested.read_text()) if nested.exists() else None,
        sorted((t.name, str(t.dtype), list(t.shape)) for t in StoredTensors(folder).values()),
    ]
    versions = ("version", "exported_by", "producer")
    return hashlib.sha256(json.dumps(_without(content, versions)).encode()).hexdigest()[:16]


def _without(content: Any, names: tuple[str, ...]) -> Any:
    if isinstance(content, dict):
        return {k: _without(content[k], names) for k in sorted(content) if k not in names}
    return [_without(item, names) for item in content] if isinstance(content, list) else content


def _format(case: Case, kind: str, slot: str, loaded: Tiny) -> FormatName:
    is_expert = loaded.model_map.slots[slot].kind is SlotKind.EXPERT
    if is_expert and case.container is COMPRESSED:
        return NONE  # transformers reads no experts from there
    if kind == UNIFORM:
        return case.format
    if case.spelling is not Spelling.OWN:
        return case.format if "self_attn" in slot else NONE
    if not is_expert and "layers.1." in slot and ("o_proj" in slot or "down_proj" in slot):
        return NONE
    partner = FP8 if case.format == NVFP4 else NVFP4
    has_experts = any(s.kind is SlotKind.EXPERT for s in loaded.model_map.slots.values())
    if has_experts and case.container is MODELOPT:
        return case.format if is_expert else partner
    return case.format if "self_attn" in slot else partner


@cache
def _tiny(family: str) -> Tiny:
    source = Path(mkdtemp()) / "model"
    if family == LLAMA:
        _write_llama(source)
    else:
        write_family_model(LLAMA if family == NARROW else family, source)
    model = load_model(source)
    return Tiny(source, model, discover(model))


def _write_llama(folder: Path) -> None:
    """As the tiny one, with 128 rows in every matrix that blocks of 128 x 128 are to fill."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)


def change_manifests(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply the change to each manifest that there is, with `ignore` under that name."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    nested = folder / "hf_quant_config.json"
    if nested.exists():
        content = json.loads(nested.read_text())
        inner = content["quantization"]
        inner["ignore"] = inner.pop("exclude_modules")
        change(inner)
        inner["exclude_modules"] = inner.pop("ignore")
        nested.write_text(json.dumps(content))


def _without_aliases(manifest: dict[str, Any]) -> None:
    layers = manifest["quantized_layers"]
    for name in [n for n in layers if n.endswith(("qkv_proj", "gate_up_proj"))]:
        del layers[name]


def _without_nvfp4(manifest: dict[str, Any]) -> None:
    for name in manifest["quantized_layers"]:
        manifest["quantized_layers"][name] = {"quant_algo": "FP8"}


def _with_unknown_algorithm(manifest: dict[str, Any]) -> None:
    manifest["quantized_layers"][DOWN] = {"quant_algo": "NF3"}


def _with_part_of_names_excluded(manifest: dict[str, Any]) -> None:
    manifest["ignore"].append(LAYER)


def _with_one_of_three_excluded(manifest: dict[str, Any]) -> None:
    manifest["ignore"].append(Q)


def _with_one_of_three_different(manifest: dict[str, Any]) -> None:
    _without_aliases(manifest)
    manifest["quantized_layers"][Q] = {"quant_algo": "NVFP4", "group_size": 16}


def _with_a_module_in_no_group(manifest: dict[str, Any]) -> None:
    for group in manifest["config_groups"].values():
        group["targets"] = [target for target in group["targets"] if "down" not in target]


def _without_fused_names(manifest: dict[str, Any]) -> None:
    for group in manifest["config_groups"].values():
        group["targets"] = [
            t.replace("|qkv", "")
            .replace("|gate_up", "")
            .replace("qkv|", "")
            .replace("gate_up|", "")
            for t in group["targets"]
        ]


def _without_fused_entries(manifest: dict[str, Any]) -> None:
    left_out = manifest["modules_to_not_convert"]
    left_out[:] = [name for name in left_out if not name.endswith("gate_up_proj")]


def _with_one_of_three_left_out(manifest: dict[str, Any]) -> None:
    manifest["modules_to_not_convert"].append(Q)


def _with_a_cache_by_name_alone(manifest: dict[str, Any]) -> None:
    """As ModelOpt itself writes FP8 in its nested manifest, and others in the flat one."""
    manifest.pop("kv_cache_scheme", None)
    manifest["kv_cache_quant_algo"] = "FP8"


def _with_a_cache_that_may_be_dynamic(manifest: dict[str, Any]) -> None:
    if isinstance(manifest.get("kv_cache_scheme"), dict):
        del manifest["kv_cache_scheme"]["dynamic"]


def _with_a_cache_promised(manifest: dict[str, Any]) -> None:
    manifest.update(manifest_entries(FP8, MODELOPT))


DAMAGES: Mapping[tuple[Container, str], Callable[[dict[str, Any]], object]] = {
    (MODELOPT, "without aliases"): _without_aliases,
    (MODELOPT, "mixed without nvfp4"): _without_nvfp4,
    (MODELOPT, "unknown algorithm"): _with_unknown_algorithm,
    (MODELOPT, "part of names excluded"): _with_part_of_names_excluded,
    (MODELOPT, "one of three excluded"): _with_one_of_three_excluded,
    (MODELOPT, "one of three different"): _with_one_of_three_different,
    (COMPRESSED, "module in no group"): _with_a_module_in_no_group,
    (COMPRESSED, "without fused names"): _without_fused_names,
    (MODELOPT, "fp8 cache by name alone"): _with_a_cache_by_name_alone,
    (MODELOPT, "fp8 cache, perhaps dynamic"): _with_a_cache_that_may_be_dynamic,
}
"""What is done to a mixed checkpoint of Llama, fp8 attention and nvfp4 feed-forward parts."""

KEYS, VALUES = 224.0, 112.0
"""The largest magnitudes; as FP8 under scales of 0.5 and 0.25."""

CACHES: Mapping[tuple[Container, str], FormatName] = {
    (MODELOPT, "fp8 cache"): FP8,
    (MODELOPT, "fp8 cache by name alone"): FP8,
    (MODELOPT, "fp8 cache, perhaps dynamic"): FP8,
    (MODELOPT, "nvfp4 cache"): NVFP4,
    (MODELOPT, f"nvfp4 cache{ALONE}"): NVFP4,
    (COMPRESSED, "fp8 cache"): FP8,
    (COMPRESSED, "int8 cache"): FormatName("int8"),
}
"""Mixed checkpoints of Llama with a quantised key/value cache; some with changed manifests."""

FP8_DAMAGES: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "without fused names": _without_fused_entries,
    "one of three left out": _with_one_of_three_left_out,
    "cache promised": _with_a_cache_promised,
}
"""What is done to one of transformers' own fp8: attention in blocks, feed-forward parts left out."""


def written(folder: Path) -> Iterator[tuple[Case, Path]]:
    """Every case and its folder, `folder` / str(case)."""
    for case in cases():
        yield case, write_case(case, folder / str(case))


def main() -> None:
    """Write all checkpoints, and what their digests are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {str(case): digest(path) for case, path in written(folder)}
    for family in (*FAMILIES, NARROW):
        name = f"{family}/{SOURCE}"
        found[name] = digest(shutil.copytree(_tiny(family).source, folder / name))
    (folder / "cases.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
