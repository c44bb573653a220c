"""A quantised key/value cache in checkpoints: written, read back, loaded, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoq.calibration.kv_cache import calibrate_cache
from autoq.errors import ExportError, VerificationError
from autoq.export import (
    ExportedCache,
    load_packed,
    read_quantized,
    simulated_checkpoint,
    verify_checkpoint,
    verify_logits,
)
from autoq.export.checkup import check_checkpoint
from autoq.formats import FormatName
from autoq.layers import Container
from autoq.layers.kv_cache import CacheSimulation, cached_layers
from autoq.models import forward_logits
from tests.export.conftest import Planned

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
CASES = [(MODELOPT, "fp8"), (MODELOPT, "nvfp4"), (COMPRESSED, "fp8"), (COMPRESSED, "int8")]
every_case = pytest.mark.parametrize(("container", "fmt"), CASES, ids=lambda value: str(value))
MixedPlan = Callable[[str, Container], Planned]

FP8_ANYWHERE = {"dynamic": False, "num_bits": 8, "type": "float"}


def token_ids() -> Tensor:
    return torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(3))


def cache_of(model: nn.Module, *formats: str) -> ExportedCache:
    """Calibrated on some tokens; one format for all layers, or one each."""
    layers = cached_layers(model, lambda: forward_logits(model, token_ids()))
    layers = calibrate_cache(model, layers, [token_ids()], lambda ids: forward_logits(model, ids))
    each = formats * len(layers) if len(formats) == 1 else formats
    names = (FormatName(name) for name in each)
    return ExportedCache(layers, dict(zip((e.name for e in layers), names, strict=True)))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return forward_logits(model, token_ids())


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[Any], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


@every_case
def test_scales_and_manifest_are_as_readers_want_them(
    mixed_plan: MixedPlan, tmp_path: Path, container: Container, fmt: str
) -> None:
    planned = mixed_plan("llama", container)
    cache = cache_of(planned.tiny.model, fmt)
    result = planned.export(tmp_path / "out", kv_cache=cache)
    stored = tensors(result.path)
    divisor = {"fp8": 448.0, "nvfp4": 448.0, "int8": 127.0}[fmt]
    for number, layer in enumerate(cache.layers):
        attention = f"model.layers.{number}.self_attn"
        names, shape = (("k_proj.k_scale", "v_proj.v_scale"), ())
        if container is COMPRESSED:
            names, shape = ("k_scale", "v_scale"), (1,)
        for name, amax in zip(names, (layer.key_amax, layer.value_amax), strict=True):
            scale = stored[f"{attention}.{name}"]
            assert scale.dtype == torch.float32
            assert tuple(scale.shape) == shape
            assert float(scale) == float(torch.tensor(amax) / divisor)
    flat = result.manifest
    if container is COMPRESSED:
        element = "float" if fmt == "fp8" else "int"
        assert flat["kv_cache_scheme"] == {
            "num_bits": 8,
            "type": element,
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        }
        return
    assert flat["kv_cache_scheme"] == (FP8_ANYWHERE if fmt == "fp8" else "NVFP4")
    nested = json.loads((result.path / "hf_quant_config.json").read_text())["quantization"]
    assert flat["kv_cache_quant_algo"] == nested["kv_cache_quant_algo"] == fmt.upper()


@every_case
@torch.no_grad()
def test_read_back_it_computes_what_was_simulated(
    mixed_plan: MixedPlan, tmp_path: Path, container: Container, fmt: str
) -> None:
    planned = mixed_plan("llama", container)
    cache = cache_of(planned.tiny.model, fmt)
    result = planned.export(tmp_path / "out", kv_cache=cache)
    verify_checkpoint(result.path, *planned.expected(), kv_cache=cache)
    plain = simulated_checkpoint(planned.export(tmp_path / "plain").path, dtype=torch.float32)
    without = logits(plain.model)
    layers = cache.layers
    plain.set_kv_cache(CacheSimulation.calibrated(plain.model, cache.formats, layers))
    expected = logits(plain.model)
    assert not torch.equal(expected, without)
    found = simulated_checkpoint(result.path, dtype=torch.float32).model
    assert torch.equal(logits(found), expected)
    packed = load_packed(result.path, dtype=torch.float32)
    assert torch.equal(logits(packed), expected)
    assert not [fault for fault in check_checkpoint(result.path).faults if "cache" in str(fault)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_transformers_computes_the_same(
    mixed_plan: MixedPlan, tmp_path: Path, fmt: str, name: str
) -> None:
    planned = mixed_plan(name, COMPRESSED)
    cache = cache_of(planned.tiny.model, fmt)
    result = planned.export(tmp_path / "out", kv_cache=cache)
    difference = verify_logits(result.path, token_ids())
    plain = planned.export(tmp_path / "plain")
    changed = logits(simulated_checkpoint(result.path, dtype=torch.float32).model)
    without = logits(simulated_checkpoint(plain.path, dtype=torch.float32).model)
    # Other orders of sums move single keys to the next code, which `verify_logits` allows for; what
    # the cache changes is several times what they do.
    assert float((changed - without).norm() / without.norm()) > 3 * difference


def test_a_scale_that_was_changed_is_found(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    planned = mixed_plan("llama", MODELOPT)
    cache = cache_of(planned.tiny.model, "fp8")
    out = planned.export(tmp_path / "out", kv_cache=cache).path
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.v_scale"
    save_file({**stored, name: stored[name] * 2}, out / "model.safetensors")
    with pytest.raises(VerificationError, match=f"{name} differs"):
        verify_checkpoint(out, *planned.expected(), kv_cache=cache)
    with pytest.raises(VerificationError, match="without its scales"):
        verify_checkpoint(out, *planned.expected())
    save_file({**stored, name: -stored[name]}, out / "model.safetensors")
    with pytest.raises(ExportError, match="must be positive and finite"):
        load_packed(out)
    del stored[name]
    save_file(stored, out / "model.safetensors")
    with pytest.raises(ExportError, match="one is missing"):
        read_quantized(out)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_checkpoints_of_modelopt_itself_name_the_scheme_alone(
    mixed_plan: MixedPlan, tmp_path: Path, fmt: str
) -> None:
    planned = mixed_plan("llama", MODELOPT)
    out = planned.export(tmp_path / "out", kv_cache=cache_of(planned.tiny.model, fmt)).path
    before = read_quantized(out).kv_cache
    edit_config(out, lambda m: m.pop("kv_cache_quant_algo"))
    assert before is not None and before.format == fmt
    assert read_quantized(out).kv_cache == before


def test_without_scales_fp8_is_kept_under_a_scale_of_one(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", MODELOPT).export(tmp_path / "out").path
    without = logits(load_packed(out, dtype=torch.float32))
    edit_config(out, lambda m: m.update(kv_cache_scheme=FP8_ANYWHERE, kv_cache_quant_algo="FP8"))
    found = load_packed(out, dtype=torch.float32)
    layers = cached_layers(found, lambda: logits(found))
    model = load_packed(
        mixed_plan("llama", MODELOPT).export(tmp_path / "p").path, dtype=torch.float32
    )
    of_one = [replace(layer, key_amax=448.0, value_amax=448.0) for layer in layers]
    formats = {layer.name: FormatName("fp8") for layer in layers}
    CacheSimulation.calibrated(model, formats, of_one).install()
    assert torch.equal(logits(found), logits(model))
    assert not torch.equal(logits(found), without)


def test_promises_that_cannot_be_read_are_refused(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    out = mixed_plan("llama", COMPRESSED).export(tmp_path / "out").path
    edit_config(out, lambda m: m.update(kv_cache_scheme=scheme))
    with pytest.raises(ExportError, match="there are no scales"):
        read_quantized(out)
    edit_config(out, lambda m: m.update(kv_cache_scheme={**scheme, "strategy": "attn_head"}))
    with pytest.raises(ExportError, match="does not read"):
        read_quantized(out)


def test_what_no_container_holds_is_refused(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    planned = mixed_plan("llama", MODELOPT)
    model = planned.tiny.model
    with pytest.raises(ExportError, match="one format of the key/value cache for all layers"):
        planned.export(tmp_path / "out", kv_cache=cache_of(model, "fp8", "nvfp4"))
    with pytest.raises(ExportError, match="reads a key/value cache in int8 from modelopt"):
        planned.export(tmp_path / "out", kv_cache=cache_of(model, "int8"))
    bare = planned.with_formats({})
    with pytest.raises(ExportError, match="has no manifest to state"):
        bare.export(tmp_path / "out", kv_cache=cache_of(model, "fp8"))
    assert not (tmp_path / "out").exists()
