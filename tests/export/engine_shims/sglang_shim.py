"""SGLang with a GPU that is only described: which it thinks it has, and nothing that it computes with.

In the place of what a machine without CUDA lacks:

* torch's answers about the GPU: its compute capability, memory and name; tensors that are asked for
  on it are made on the CPU;
* `sgl_kernel`: its functions are declared and fail when called; its types of scalars are its own;
* Triton's driver, which says that it is active;
* distribution: one process, by gloo;
* torchvision's operators, which its wheel has for CUDA alone: two are declared;
* the choice of a kernel that multiplies by two matrices at once: none is chosen.

What SGLang does with the weights after they are loaded calls its kernels, and is not asked.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KERNELS = "sgl_kernel"
_UNTOUCHED = 0xA5
_OF_FP4 = ("ModelOptFp4LinearMethod",)
_NOT_STORED = ("embed_tokens.weight", "lm_head.weight", "_blockscale_swizzled")
"""Tables, which are padded, and what SGLang makes of scales after it has loaded them."""
_MEMORY = 80 * 2**30
_LONGEST_REASON = 300


class Engine:
    """SGLang on one kind of GPU."""

    def __init__(self, capability: int, wheel: Path) -> None:
        """
        Args:
            capability: 90 for compute capability 9.0.
            wheel: the folder that the wheels of sglang and sglang-kernel are unpacked in.
        """
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        logging.disable(logging.CRITICAL)
        self._capability, self._is_distributed = capability, False
        sys.path.insert(0, str(wheel))
        _describe_gpu(capability)
        _declare_kernels(wheel)
        _activate_triton()
        from sglang.srt.layers.dual_gemm import DualGemm

        DualGemm._select_mode = lambda *_: None
        self._on_cpu = _mode_of_cpu()

    def versions(self) -> dict[str, str]:
        """Of the engine, and of what its answers depend on."""
        names = ("sglang", "sglang-kernel", "torch", "transformers", "compressed-tensors")
        return {name: importlib.metadata.version(name) for name in names}

    def answer(self, checkpoint: Path) -> dict[str, Any]:
        """The quantisation that it reads, what it makes of each layer, and where it stops."""
        found: dict[str, Any] = {}
        stage = "reads"
        with self._on_cpu:
            try:
                model_config, load_config, config = self._config(checkpoint)
                found["config"] = type(config).__name__
                stage = "builds"
                model = _build(model_config, load_config, config)
                found["modules"] = _modules(model)
                stage = "loads"
                found["without values"] = _load(model_config, load_config, model)
                if _states_a_cache(checkpoint):
                    stage = "caches"
                    found["cache"] = _caches(model, model_config.dtype)
            except Exception as error:  # noqa: BLE001  (whatever stops it is the answer)
                text = " ".join(str(error).split()).replace(str(checkpoint), "CHECKPOINT")
                found["refused"] = [stage, f"{type(error).__name__}: {text[:_LONGEST_REASON]}"]
        return found

    def _config(self, checkpoint: Path) -> tuple[Any, Any, Any]:
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader.loader import _get_quantization_config

        dtype = "float16" if self._capability < 80 else "bfloat16"
        self._publish(checkpoint, dtype)
        model_config = ModelConfig(str(checkpoint), dtype=dtype)
        load_config = LoadConfig()
        return model_config, load_config, _get_quantization_config(model_config, load_config)

    def _publish(self, checkpoint: Path, dtype: str) -> None:
        """The settings of a server for the checkpoint, groups of one process, chosen back ends."""
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers.dp_attention import initialize_dp_attention
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
        from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
        from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config
        from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, reset_context
        from sglang.srt.server_args import ServerArgs

        settings = ServerArgs(
            model_path=str(checkpoint),
            dtype=dtype,
            device="cuda",
            attention_backend="triton",
            sampling_backend="pytorch",
        )
        if self._is_distributed:
            parallel_state.destroy_model_parallel()
        reset_context()
        publish(settings, role="test", ranks=SpawnRanks(world_rank=0))
        if not self._is_distributed:
            place = f"file://{tempfile.mkdtemp()}/group"
            parallel_state.init_distributed_environment(1, 0, place, 0, "gloo")
            self._is_distributed = True
        get_parallel().override_permanently(world_group=parallel_state._WORLD)
        parallel_state.initialize_model_parallel(backend="gloo")
        initialize_dp_attention(server_args=settings)
        initialize_moe_config()
        initialize_fp8_gemm_config()
        initialize_fp4_gemm_config()
        initialize_bf16_gemm_config()


def _describe_gpu(capability: int) -> None:
    import torch

    major, minor = divmod(capability, 10)
    name = f"a GPU of compute capability {capability / 10}"
    torch.version.cuda = "13.0"
    gpu = torch.cuda
    gpu.is_available = lambda: True
    gpu.device_count = lambda: 1
    gpu.current_device = lambda: 0
    gpu.get_device_name = lambda device=None: name
    gpu.get_device_capability = lambda device=None: (major, minor)
    gpu.Stream = gpu.Event = _Unused
    gpu.max_memory_allocated = lambda device=None: 0
    gpu.mem_get_info = lambda device=None: (_MEMORY, _MEMORY)
    gpu.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=major, minor=minor, name=name, total_memory=_MEMORY, multi_processor_count=132
    )
    for operator in ("nms", "qnms"):
        schema = "(Tensor d, Tensor s, float bound) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)


class _Unused:
    """A stream or an event of a GPU, which is made and never used."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


class _Declared(types.ModuleType):
    """Has every function, and none that can be called."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*_: object, **__: object) -> None:
            raise RuntimeError(f"the kernel {name} was called, and there is no GPU")

        return kernel


class _Kernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, wheel: Path) -> None:
        self._wheel = wheel

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == f"{_KERNELS}.scalar_type":
            own = self._wheel / _KERNELS / "scalar_type.py"
            return importlib.util.spec_from_file_location(name, own)
        if name.partition(".")[0] == _KERNELS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Declared(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _declare_kernels(wheel: Path) -> None:
    sys.meta_path.insert(0, _Kernels(wheel))


def _activate_triton() -> None:
    from triton.backends import backends

    for name, backend in backends.items():
        backend.driver.is_active = classmethod(lambda cls, name=name: name == "nvidia")


def _mode_of_cpu() -> Any:
    """Tensors for the GPU are made on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    def on_cpu(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return "cpu" if is_device else value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            named = dict(kwargs or {})
            if "device" in named:
                named["device"] = on_cpu(named["device"])
            if function is torch.Tensor.cuda:
                return args[0]
            if function is torch.Tensor.to:
                args = tuple(on_cpu(value) for value in args)
            return function(*args, **named)

    return OnCpu()


def _build(model_config: Any, load_config: Any, config: Any) -> Any:
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(model_config.dtype):
        return _initialize_model(model_config, load_config, config)


def _modules(model: Any) -> dict[str, str]:
    """Layer -> the classes of its method and scheme, and the kernels that they chose."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not name.endswith((".attn", "embed_tokens")):
            found[name] = " ".join(_names(module, method))
    return found


def _names(module: Any, method: Any) -> Iterator[str]:
    from sglang.srt.layers.quantization.fp4_utils import get_fp4_gemm_runner_backend

    scheme = getattr(module, "scheme", None)
    for owner in (method, scheme):
        if owner is None:
            continue
        yield type(owner).__name__
        if getattr(owner, "use_marlin", False):
            yield "Marlin"
        runner = getattr(owner, "runner", None)
        if runner is not None:
            yield runner.runner_backend.value.capitalize()
    if type(method).__name__ in _OF_FP4:
        yield get_fp4_gemm_runner_backend().value.capitalize()


def _states_a_cache(checkpoint: Path) -> bool:
    manifest = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    stated = manifest or {}
    return any(stated.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))


def _caches(model: Any, dtype: Any) -> list[str]:
    """What keys and values are kept in, and under which scales, once each."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

    _, kept = configure_kv_cache_dtype(
        server_args_kv_cache_dtype="auto",
        model=model,
        model_dtype=dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    found = set()
    for layer in model.modules():
        if isinstance(layer, RadixAttention):
            method = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)
            keys, values = layer.k_scale_float, layer.v_scale_float
            scales = "none" if keys is None else f"{keys:g}, {values:g}"
            found.add(f"{str(kept).removeprefix('torch.')} under {scales}")
    return sorted(found)


def _load(model_config: Any, load_config: Any, model: Any) -> list[str]:
    """Parameters with a row that no tensor was loaded into."""
    import torch
    from sglang.srt.model_loader.loader import DefaultModelLoader

    for _, parameter in model.named_parameters():
        if parameter.numel():
            parameter.data.reshape(-1).view(torch.uint8).fill_(_UNTOUCHED)
    weights = DefaultModelLoader(load_config)._get_all_weights(model_config, model)
    DefaultModelLoader.load_weights_only(model, weights, torch.device("cpu"))
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and not name.endswith(_NOT_STORED) and _has_untouched_row(parameter)
    )


def _has_untouched_row(parameter: Any) -> bool:
    import torch

    rows = parameter.data.contiguous().reshape(len(parameter) if parameter.dim() else 1, -1)
    return bool((rows.view(torch.uint8) == _UNTOUCHED).all(dim=1).any())
