"""`auto_quantize` with a format of the key/value cache: in the model, and in what is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import autoq
from autoq.errors import ExportError, InputError
from autoq.layers.kv_cache import watched_cache
from autoq.models import forward_logits
from autoq.testing.tiny_models import make_tiny_model

LAYERS = [f"model.layers.{number}.self_attn" for number in (0, 1)]


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (2, 24), generator=generator) for _ in range(2)]


@torch.no_grad()
def test_the_result_has_the_cache_and_exports_with_it(
    batches: list[Tensor], tmp_path: Path
) -> None:
    model = make_tiny_model("llama", dtype=torch.float32).eval()
    largest = dict.fromkeys(LAYERS, (0.0, 0.0))

    def record(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = (float(keys.abs().max()), float(values.abs().max()))
        largest[name] = tuple(map(max, largest[name], seen))
        return keys, values

    with watched_cache(model, LAYERS, record):
        for ids in batches:
            forward_logits(model, ids)
    options = {"constraints": {"effective_bits": 6.0}, "data_loader": batches}
    options["quantization_formats"] = ["nvfp4", "fp8"]
    with torch.enable_grad():
        plain, state = autoq.auto_quantize(make_tiny_model("llama", dtype=torch.float32), **options)
        without = forward_logits(plain, batches[0]).detach()
        assert state.kv_cache is None
        model, state = autoq.auto_quantize(model, **options, kv_cache_format="fp8")
    found = forward_logits(model, batches[0])
    assert not torch.equal(found, without)

    written = state.export(tmp_path / "out")
    assert written.manifest["kv_cache_quant_algo"] == "FP8"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, (keys, values) in largest.items():
        for leaf, amax in (("k_proj.k_scale", keys), ("v_proj.v_scale", values)):
            expected = torch.tensor(amax) / 448
            assert torch.equal(tensors[f"{name}.{leaf}"], expected)
    # The model is what it was, quantised, and so is what was written.
    assert torch.equal(forward_logits(model, batches[0]), found)
    with pytest.raises(ExportError, match="exists"):
        state.export(tmp_path / "out")

    _, again = autoq.auto_quantize(model, {"effective_bits": 5.0}, state=state)
    assert again.kv_cache is state.kv_cache
    with pytest.raises(InputError, match="that of the state, fp8"):
        autoq.auto_quantize(model, state=state, kv_cache_format="nvfp4")


def test_formats_that_the_container_lacks_are_refused(batches: list[Tensor]) -> None:
    model: nn.Module = make_tiny_model("llama", dtype=torch.float32)
    with pytest.raises(InputError, match="kv_cache_format int8 does not go with modelopt"):
        autoq.auto_quantize(model, data_loader=batches, kv_cache_format="int8")
