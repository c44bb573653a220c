"""Key/value caches that ModelOpt itself calibrates and exports: what autoq's are compared with.

Runs in an environment of its own that has ModelOpt 0.47 and transformers, and imports nothing of
autoq. The model is autoq's tiny llama, written by `write_tiny_model("llama", MODEL)`, run in float32 so
that both sides see the same keys; of each checkpoint the scales and what manifests say are kept, and
of one tensor of keys what ModelOpt's quantisers make of it.

    MODELOPT_VENV/bin/python tests/export/make_modelopt_kv_golden.py MODEL tests/export/modelopt_golden
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

CONFIGS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
"""autoq's format -> ModelOpt's configuration; it exports no cache in INT8."""

SEQUENCES, TOKENS = 4, 32


def main() -> None:
    """Quantise the model and its cache in every format, and keep what the tests need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peer"))
    from modelopt_cpu_shim import install  # type: ignore[import-not-found]

    install()
    import modelopt

    weights = (arguments.model / "model.safetensors").read_bytes()
    found: dict[str, Any] = {
        "modelopt": modelopt.__version__,
        "source_sha256": hashlib.sha256(weights).hexdigest(),
    }
    for fmt, config in CONFIGS.items():
        found[fmt] = {"config": config, **_export(arguments.model, config)}
    text = json.dumps(found, indent=1, sort_keys=True)
    (arguments.destination / "kv_cache.json").write_text(text + "\n")


def _export(model: Path, config: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
    import torch
    from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found]
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    settings = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    settings["quant_cfg"] = [*settings["quant_cfg"], *getattr(mtq, config)["quant_cfg"]]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(loaded, settings, lambda module: module(ids))
        quantizer = quantized.model.layers[0].self_attn.k_bmm_quantizer
        amax = float(quantizer.amax)
        keys = torch.randn(4, 32, generator=generator) * (amax / 3)
        rounded = quantizer(keys)
        with torch.inference_mode():
            export_hf_checkpoint(quantized, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        flat = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        nested = json.loads((Path(folder) / "hf_quant_config.json").read_text())["quantization"]
    scales = {n: t for n, t in tensors.items() if n.endswith((".k_scale", ".v_scale"))}
    return {
        "scales": {name: float(tensor) for name, tensor in scales.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in scales.items()},
        "dtypes": sorted({str(tensor.dtype) for tensor in scales.values()}),
        "kv_cache_scheme": flat.get("kv_cache_scheme"),
        "kv_cache_quant_algo": nested.get("kv_cache_quant_algo"),
        "keys": keys.tolist(),
        "rounded_keys": rounded.tolist(),
    }


if __name__ == "__main__":
    main()
