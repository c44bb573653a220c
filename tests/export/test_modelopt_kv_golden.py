"""The key/value cache beside ModelOpt's own: scales, names, manifests, and rounded keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoq.calibration.kv_cache import calibrate_cache
from autoq.export._kv_cache import ExportedCache, cache_tensors, manifest_entries
from autoq.export._names import linear_modules
from autoq.formats import Container, FormatName
from autoq.layers.kv_cache import cached_layers, fake_quantize_cache
from autoq.models import forward_logits, load_model
from autoq.testing.tiny_models import write_tiny_model

GOLDEN = json.loads((Path(__file__).parent / "modelopt_golden" / "kv_cache.json").read_text())
FORMATS = tuple(FormatName(name) for name in ("fp8", "nvfp4"))
SEQUENCES, TOKENS = 4, 32  # as make_modelopt_kv_golden.py has them


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_model("llama", tmp_path_factory.mktemp("golden") / "llama")
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == GOLDEN["source_sha256"], "make the golden anew"
    return load_model(folder, dtype="float32")


@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_and_words_are_modelopts(model: Any, fmt: FormatName) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    layers = cached_layers(model, lambda: forward_logits(model, ids[:1]))
    layers = calibrate_cache(model, layers, [ids], lambda batch: forward_logits(model, batch))
    cache = ExportedCache(layers, {layer.name: fmt for layer in layers})
    names = {path: path for path in linear_modules(model)}
    found = cache_tensors(cache, names, Container.MODELOPT)
    golden = GOLDEN[fmt]
    assert {name: list(scale.shape) for name, scale in found.items()} == golden["shapes"]
    assert sorted({str(scale.dtype) for scale in found.values()}) == golden["dtypes"]
    for name, scale in found.items():
        # Attention kernels sum in another order, and the second layer's keys come after one.
        assert float(scale) == pytest.approx(golden["scales"][name], rel=1e-6)
    words = manifest_entries(fmt, Container.MODELOPT)
    assert words == {key: golden[key] for key in ("kv_cache_scheme", "kv_cache_quant_algo")}


@pytest.mark.parametrize("fmt", FORMATS)
def test_keys_are_rounded_as_modelopt_rounds_them(fmt: FormatName) -> None:
    golden = GOLDEN[fmt]
    keys, expected = torch.tensor(golden["keys"]), torch.tensor(golden["rounded_keys"])
    scale = torch.tensor(golden["scales"]["model.layers.0.self_attn.k_proj.k_scale"])
    found = fake_quantize_cache(keys, fmt, scale)
    assert not torch.equal(found, keys)
    # The same codes; ModelOpt multiplies by reciprocals of scales, which moves the last bit.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
