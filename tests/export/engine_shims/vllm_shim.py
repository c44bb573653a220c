"""vLLM with a GPU that is only described: which it thinks it has, and nothing that it computes with.

In the place of what a machine without CUDA lacks:

* the operators of the wheel's libraries: declared by the schemas that the libraries hold, without
  kernels, so that "is it built?" is answered as the wheel would;
* five questions that are answered in C++, which kernels CUTLASS has for a GPU: as in vLLM's
  csrc/libtorch_stable/quantization/w8a8/cutlass/scaled_mm_entry.cu and .../fp4;
* the platform: vLLM's own for CUDA, with the compute capability, memory and name given;
* Triton's driver, which says that it is active;
* distribution: one process, by gloo;
* torchvision's operators, which its wheel has for CUDA alone: two are declared;
* the inspection of model classes, in this process and not in another.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

_LIBRARIES = {
    "_C": "_C_stable_libtorch",
    "_moe_C": "_moe_C_stable_libtorch",
    "_qutlass_C": "_qutlass_C",
}
_SCHEMA = re.compile(rb"(?<=\0)([a-z]\w*\([^\0]{0,3000}?\) *-> *[^\0]{1,200})(?=\0)")
_CUTLASS_FROM = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
    "mxfp4_experts_quant_supported": 100,
}
_OF_ATTENTION = re.compile(r"\.(attn|attn\.impl)\.\w+$")
_CHOICES = ("kernel", "fp8_linear", "experts_cls")
_LONGEST_REASON = 300


class Engine:
    """vLLM on one kind of GPU."""

    def __init__(self, capability: int, wheel: Path) -> None:
        """
        Args:
            capability: 90 for compute capability 9.0.
            wheel: the folder that the wheel is unpacked in.
        """
        os.environ |= {
            "VLLM_LOGGING_LEVEL": "CRITICAL",
            "VLLM_HAS_FLASHINFER_CUBIN": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import torch

        torch.version.cuda = "13.0"
        sys.path.insert(0, str(wheel))
        self._capability, self._is_distributed = capability, False
        self._declared = [_declare(ns, wheel / "vllm" / so) for ns, so in _LIBRARIES.items()]
        for name, least in _CUTLASS_FROM.items():
            self._declared[0].impl(
                name, lambda asked, least=least: asked >= least, "CompositeExplicitAutograd"
            )
        _stub_modules()
        _activate_triton()
        _describe_gpu(capability)
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda inspect: inspect()

    def versions(self) -> dict[str, str]:
        """Of the engine, and of what its answers depend on."""
        names = ("vllm", "torch", "transformers", "compressed-tensors", "flashinfer-python")
        return {name: importlib.metadata.version(name) for name in names}

    def answer(self, checkpoint: Path) -> dict[str, Any]:
        """The quantisation that it reads, what it makes of each layer, and where it stops."""
        found: dict[str, Any] = {}
        stage = "reads"
        try:
            config = self._config(checkpoint)
            found["config"] = type(config.quant_config).__name__
            stage = "builds"
            model = self._build(config)
            found["modules"] = _modules(model)
            stage = "loads"
            found["without values"] = _load(config, model)
            if _states_a_cache(checkpoint):
                stage = "caches"
                found["cache"] = _caches(model)
        except Exception as error:  # noqa: BLE001  (whatever stops it is the answer)
            text = " ".join(str(error).split())[:_LONGEST_REASON]
            found["refused"] = [stage, f"{type(error).__name__}: {text}"]
        return found

    def _config(self, checkpoint: Path) -> Any:
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, VllmConfig
        from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

        dtype = "float16" if self._capability < 80 else "bfloat16"
        model = ModelConfig(
            model=str(checkpoint), tokenizer=str(checkpoint), dtype=dtype, enforce_eager=True
        )
        cache = CacheConfig(cache_dtype=resolve_kv_cache_dtype_string("auto", model))
        device = DeviceConfig(device="cpu")
        return VllmConfig(model_config=model, cache_config=cache, device_config=device)

    def _build(self, config: Any) -> Any:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import (
            destroy_model_parallel,
            init_distributed_environment,
            initialize_model_parallel,
        )
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            if not self._is_distributed:
                place = f"file://{tempfile.mkdtemp()}/group"
                init_distributed_environment(1, 0, place, 0, "gloo")
                self._is_distributed = True
            destroy_model_parallel()
            initialize_model_parallel(1, 1)  # has a group for experts only if the model has some
            return initialize_model(vllm_config=config)


def _declare(namespace: str, library: Path) -> Any:
    import torch

    declared = torch.library.Library(namespace, "FRAGMENT")
    content = library.with_name(f"{library.name}.abi3.so").read_bytes()
    for schema in sorted(set(_SCHEMA.findall(content))):
        declared.define(schema.decode().replace("Tensor !", "Tensor! ").strip())
    return declared


def _stub_modules() -> None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor d, Tensor s, float bound) -> Tensor")
    names = [*_LIBRARIES.values(), "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C"]
    for name in names:
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")


def _activate_triton() -> None:
    from triton.backends import backends

    for name, backend in backends.items():
        backend.driver.is_active = classmethod(lambda cls, name=name: name == "nvidia")


def _describe_gpu(capability: int) -> None:
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Described(CudaPlatformBase):
        device_type = "cpu"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*divmod(capability, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"a GPU of compute capability {capability / 10}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

    vllm.platforms._current_platform = Described()
    vllm.platforms.current_platform = vllm.platforms._current_platform


def _modules(model: Any) -> dict[str, str]:
    """Layer -> the classes of its method, scheme and kernel."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not name.endswith((".attn", "embed_tokens")):
            found[name] = " ".join(_classes(module, method))
    return found


def _classes(module: Any, method: Any) -> list[str]:
    scheme = getattr(module, "scheme", None)
    names = [type(method).__name__] + ([type(scheme).__name__] if scheme is not None else [])
    for owner in (method, scheme):
        for choice in _CHOICES:
            chosen = getattr(owner, choice, None)
            if chosen is not None:
                names.append(chosen.__name__ if isinstance(chosen, type) else type(chosen).__name__)
    return names


def _states_a_cache(checkpoint: Path) -> bool:
    manifest = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    stated = manifest or {}
    return any(stated.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))


def _caches(model: Any) -> list[str]:
    """What attention layers keep keys and values in, and under which scales, once each."""
    from vllm.model_executor.layers.attention import Attention

    found = set()
    for layer in model.modules():
        if isinstance(layer, Attention):
            method = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)
            scales = f"{layer._k_scale_float:g}, {layer._v_scale_float:g}"
            found.add(f"{layer.kv_cache_dtype} under {scales}")
    return sorted(found)


def _load(config: Any, model: Any) -> list[str]:
    """Parameters that no tensor was loaded into; attention's scales are optional."""
    from vllm.config import LoadConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    with set_current_vllm_config(config):
        loaded = model.load_weights(loader.get_all_weights(config.model_config, model))
    lacking = {name for name, _ in model.named_parameters()} - set(loaded)
    return sorted(name for name in lacking if not _OF_ATTENTION.search(name))
