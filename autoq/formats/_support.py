"""Which engine runs which format on which GPUs: one record for each cell that differs.

GPU engines were read, not run: their loaders, kernels' guards and documentation. transformers was
executed on a CPU. Versions are those of `autoq.formats._places.ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TypeAlias

from autoq.formats._container import Container
from autoq.formats._format import NONE, FormatName
from autoq.formats._places import Support, Verdict

_FP8, _NVFP4, _W4A8 = FormatName("fp8"), FormatName("nvfp4"), FormatName("w4a8_awq")
_MODELOPT, _COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
_NATIVE, _WEIGHT_ONLY, _NO = Verdict.NATIVE, Verdict.WEIGHT_ONLY, Verdict.NO

# Compute capabilities x 10.
_TURING, _AMPERE, _ADA, _HOPPER = (75,), (80, 86), (89,), (90,)
_BLACKWELL = (100, 103, 120)
_GPUS = _TURING + _AMPERE + _ADA + _HOPPER + _BLACKWELL
_CPU = (None,)

_FP8_UNITS = "multiplied by FP8 matrix units"
_FP4_UNITS = "multiplied by FP4 matrix units"
_NO_FP8_UNITS = (
    "no FP8 matrix units before 8.9: the weights are widened in the kernel and inputs stay 16-bit"
)
_NO_FP4_UNITS = (
    "no FP4 matrix units before 10.0: the weights are widened in the kernel and inputs stay 16-bit"
)
_LEFT_AS_IT_IS = "left as the model stores it"
_NO_W4A8_AWQ = (
    "knows no W4A8_AWQ in modelopt checkpoints and would build the layer unquantised without an "
    "error"
)

_Row: TypeAlias = tuple[tuple[int | None, ...], Verdict, str]


def _records(
    engine: str,
    container: Container,
    fmt: FormatName,
    source: str,
    *rows: _Row,
    out_features_multiple: int = 1,
) -> Iterator[Support]:
    for capabilities, verdict, reason in rows:
        yield Support(
            engine=engine,
            container=container,
            format=fmt,
            capabilities=capabilities,
            verdict=verdict,
            reason=reason,
            source=source,
            out_features_multiple=out_features_multiple if verdict.runs else 1,
        )


def _everywhere(
    engine: str, capabilities: tuple[int | None, ...], reason: str, source: str
) -> Iterator[Support]:
    """Nothing runs there, in no format and from no container."""
    for container, fmt in product(Container, (_FP8, _NVFP4, _W4A8, NONE)):
        yield from _records(engine, container, fmt, source, (capabilities, _NO, reason))


def _unquantised(
    engine: str, capabilities: tuple[int | None, ...], source: str
) -> Iterator[Support]:
    for container in Container:
        row = (capabilities, _NATIVE, _LEFT_AS_IT_IS)
        yield from _records(engine, container, NONE, source, row)


_VLLM_SOURCE = "vLLM 0.33's source: read, not run"
_VLLM = (
    *_everywhere(
        "vllm",
        _CPU,
        "which formats vLLM runs on CPUs was not looked into; transformers:cpu runs them",
        "not checked",
    ),
    *_unquantised("vllm", _GPUS, _VLLM_SOURCE),
    *_records(
        *("vllm", _MODELOPT, _FP8, _VLLM_SOURCE),
        (_TURING, _NO, "vLLM takes fp8 from modelopt checkpoints from 8.0 on"),
        (_AMPERE, _WEIGHT_ONLY, _NO_FP8_UNITS),
        (_ADA + _HOPPER + _BLACKWELL, _NATIVE, _FP8_UNITS),
    ),
    *_records(
        *("vllm", _COMPRESSED, _FP8, _VLLM_SOURCE),
        (_TURING + _AMPERE, _WEIGHT_ONLY, _NO_FP8_UNITS),
        (_ADA + _HOPPER + _BLACKWELL, _NATIVE, _FP8_UNITS),
    ),
    *(
        record
        for container in Container
        for record in _records(
            *("vllm", container, _NVFP4, _VLLM_SOURCE),
            (_TURING + _AMPERE + _ADA + _HOPPER, _WEIGHT_ONLY, _NO_FP4_UNITS),
            (_BLACKWELL, _NATIVE, _FP4_UNITS),
        )
    ),
    *_records(
        *("vllm", _MODELOPT, _W4A8, _VLLM_SOURCE),
        (_GPUS, _NO, f"vLLM {_NO_W4A8_AWQ}"),
    ),
    *_records(
        *("vllm", _COMPRESSED, _W4A8, _VLLM_SOURCE),
        (_HOPPER, _NATIVE, "multiplied by an INT4 x FP8 kernel"),
        (
            _TURING + _AMPERE + _ADA + _BLACKWELL,
            _NO,
            "vLLM's INT4 x FP8 kernel is for 9.0 (Hopper) alone, and nothing stands in for it",
        ),
        out_features_multiple=128,
    ),
)

_SGLANG_SOURCE = "SGLang 0.5.23's source: read, not run"
_SGLANG = (
    *_everywhere(
        "sglang",
        _CPU,
        "which formats SGLang runs on CPUs was not looked into; transformers:cpu runs them",
        "not checked",
    ),
    *_everywhere(
        "sglang", _TURING, "SGLang asks for 8.0 or newer for these checkpoints", _SGLANG_SOURCE
    ),
    *_unquantised("sglang", _AMPERE + _ADA + _HOPPER + _BLACKWELL, _SGLANG_SOURCE),
    *_records(
        *("sglang", _MODELOPT, _FP8, _SGLANG_SOURCE),
        (
            _AMPERE,
            _NO,
            (
                "SGLang takes fp8 from modelopt checkpoints from 8.9 on; from compressed-tensors ones "
                "it runs weight-only here"
            ),
        ),
        (_ADA + _HOPPER + _BLACKWELL, _NATIVE, _FP8_UNITS),
    ),
    *_records(
        *("sglang", _COMPRESSED, _FP8, _SGLANG_SOURCE),
        (_AMPERE, _WEIGHT_ONLY, _NO_FP8_UNITS),
        (_ADA + _HOPPER + _BLACKWELL, _NATIVE, _FP8_UNITS),
    ),
    *(
        record
        for container in Container
        for record in _records(
            *("sglang", container, _NVFP4, _SGLANG_SOURCE),
            (_AMPERE + _ADA + _HOPPER, _WEIGHT_ONLY, _NO_FP4_UNITS),
            (_BLACKWELL, _NATIVE, _FP4_UNITS),
        )
    ),
    *_records(
        *("sglang", _MODELOPT, _W4A8, _SGLANG_SOURCE),
        (_AMPERE + _ADA + _HOPPER + _BLACKWELL, _NO, f"SGLang {_NO_W4A8_AWQ}"),
    ),
    *_records(
        *("sglang", _COMPRESSED, _W4A8, _SGLANG_SOURCE),
        (
            _AMPERE + _ADA + _HOPPER + _BLACKWELL,
            _NO,
            (
                "SGLang multiplies INT4 by FP8 for experts only, and not in a checkpoint that mixes "
                "formats"
            ),
        ),
    ),
)

_TENSORRT_SOURCE = "TensorRT-LLM's documentation and source of about 1.2: read, not run"
_TENSORRT_COMPRESSED = {
    _FP8: (
        "TensorRT-LLM takes fp8 with scales per channel or block from compressed-tensors, not with "
        "one per tensor"
    ),
    _NVFP4: (
        "released TensorRT-LLM reads no nvfp4 from compressed-tensors; its development sources do"
    ),
    _W4A8: "TensorRT-LLM reads no INT4 from compressed-tensors; its w4a8_awq is modelopt's",
}
_TENSORRT = (
    *_everywhere("tensorrt-llm", _CPU, "TensorRT-LLM runs on NVIDIA GPUs only", _TENSORRT_SOURCE),
    *_everywhere("tensorrt-llm", _TURING, "TensorRT-LLM runs on 8.0 and newer", _TENSORRT_SOURCE),
    *_unquantised("tensorrt-llm", _AMPERE + _ADA + _HOPPER + _BLACKWELL, _TENSORRT_SOURCE),
    *_records(
        *("tensorrt-llm", _MODELOPT, _FP8, _TENSORRT_SOURCE),
        (_AMPERE, _NO, "TensorRT-LLM runs fp8 from 8.9 on, where FP8 matrix units begin"),
        (_ADA + _HOPPER + _BLACKWELL, _NATIVE, _FP8_UNITS),
    ),
    *_records(
        *("tensorrt-llm", _MODELOPT, _NVFP4, _TENSORRT_SOURCE),
        (_AMPERE, _NO, "TensorRT-LLM runs nvfp4 from 10.0 on, where FP4 matrix units begin"),
        (
            _ADA + _HOPPER,
            _NO,
            (
                "released TensorRT-LLM runs nvfp4 from 10.0 on; weight-only on 8.9 and 9.0 is in its "
                "development sources alone"
            ),
        ),
        (_BLACKWELL, _NATIVE, _FP4_UNITS),
    ),
    *_records(
        *("tensorrt-llm", _MODELOPT, _W4A8, _TENSORRT_SOURCE),
        (_AMPERE, _NO, "w4a8_awq needs FP8 matrix units, which begin with 8.9"),
        (_ADA + _HOPPER, _NATIVE, "multiplied by an INT4 x FP8 kernel"),
        (_BLACKWELL, _NO, "no engine has an INT4 x FP8 kernel for 10.0 and newer (Blackwell)"),
    ),
    *(
        record
        for fmt, reason in _TENSORRT_COMPRESSED.items()
        for record in _records(
            *("tensorrt-llm", _COMPRESSED, fmt, _TENSORRT_SOURCE),
            (_AMPERE + _ADA + _HOPPER + _BLACKWELL, _NO, reason),
        )
    ),
)

_TRANSFORMERS_SOURCE = "transformers 5.23 with compressed-tensors 0.20: executed on a CPU"
_NO_PACKED_READER = (
    "transformers has no reader of modelopt checkpoints: packed weights do not fit their layers"
)
_TRANSFORMERS_MODELOPT = {
    _FP8: (
        "transformers has no reader of modelopt checkpoints: it loads fp8 without its scales and "
        "computes nonsense without an error"
    ),
    _NVFP4: _NO_PACKED_READER,
    _W4A8: _NO_PACKED_READER,
}
_EMULATION = "unpacked to the model's dtype, inputs rounded as the format says"
_TRANSFORMERS = (
    *_unquantised("transformers", _CPU + _GPUS, _TRANSFORMERS_SOURCE),
    *(
        record
        for fmt, reason in _TRANSFORMERS_MODELOPT.items()
        for record in _records(
            *("transformers", _MODELOPT, fmt, _TRANSFORMERS_SOURCE), (_CPU + _GPUS, _NO, reason)
        )
    ),
    *(
        record
        for fmt in (_FP8, _NVFP4, _W4A8)
        for record in _records(
            *("transformers", _COMPRESSED, fmt, _TRANSFORMERS_SOURCE),
            (_CPU + _GPUS, Verdict.EMULATED, _EMULATION),
        )
    ),
)

SUPPORT: tuple[Support, ...] = (*_VLLM, *_SGLANG, *_TENSORRT, *_TRANSFORMERS)
"""Every cell once: engine x container x format x compute capability."""
