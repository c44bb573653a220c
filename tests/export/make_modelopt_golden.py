"""Checkpoints that ModelOpt itself writes of a tiny model: what the exporter is compared with.

Runs in an environment of its own that has ModelOpt 0.47 and transformers, and imports nothing of
autoq. The model is autoq's tiny llama, written by `write_tiny_model("llama", MODEL)`; of each
checkpoint the first layer's tensors and the manifests are kept.

    MODELOPT_VENV/bin/python tests/export/make_modelopt_golden.py MODEL tests/export/modelopt_golden
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4_wo": "W4A16_NVFP4_CFG",
    "nvfp4_svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}
"""autoq's format -> ModelOpt's configuration."""

KEPT = "model.layers.0."
SEQUENCES, TOKENS = 4, 32


def main() -> None:
    """Quantise and export the model in every format, and keep what the tests need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peer"))
    from modelopt_cpu_shim import install  # type: ignore[import-not-found]

    install()
    arguments.destination.mkdir(parents=True, exist_ok=True)
    manifests: dict[str, Any] = {"source_sha256": _sha256(arguments.model / "model.safetensors")}
    for fmt, config in CONFIGS.items():
        manifests[fmt] = _export(
            arguments.model, config, arguments.destination / f"{fmt}.safetensors"
        )
    text = json.dumps({**_versions(), **manifests}, indent=1, sort_keys=True)
    (arguments.destination / "manifests.json").write_text(text + "\n")


def _export(model: Path, config: str, destination: Path) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
    import torch
    from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found]
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    size = (SEQUENCES, TOKENS)
    ids = torch.randint(loaded.config.vocab_size, size, generator=generator)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(loaded, getattr(mtq, config), lambda module: module(ids))
        with torch.inference_mode():
            export_hf_checkpoint(quantized, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        save_file(
            {name: tensor for name, tensor in tensors.items() if name.startswith(KEPT)}, destination
        )
        flat = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        nested = json.loads((Path(folder) / "hf_quant_config.json").read_text())
    return {"config": config, "flat": flat, "nested": nested, "names": sorted(tensors)}


def _versions() -> dict[str, str]:
    import modelopt
    import torch
    import transformers

    return {
        "modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
