"""INT4 weights that meet FP8 inputs: products, and the two-level form of the weight.

An `INT4Tensor` counts code * group scale here too. In the two-level form, which TensorRT-LLM runs,
the matrix unit sees e4m3(code * rate) with rate = fp16(fp16(group scale) / tensor scale); the
tensor scale multiplies the result. Group scales above 65504 overflow float16 there, and those
below 6e-8 vanish.

NaN and infinity are not looked for, because that costs a pass, and have no INT4 code: whoever
knows the layer's name checks weights and reports them.
Source: OCP 8-bit Floating Point Specification (OFP8) v1.0 for E4M3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.kernels import fp8, int4
from autoq.kernels._checks import FLOAT_DTYPES, require_dtype, require_record, require_scale
from autoq.kernels._packed import PackedTensor
from autoq.kernels._torch import int4 as _torch_int4
from autoq.kernels._torch import w4a8 as _torch
from autoq.kernels._torch.chunks import scale_from_amax
from autoq.kernels.dispatch import triton_target
from autoq.kernels.int4 import GROUP_SIZE, INT4Tensor
from autoq.kernels.targets import Target


@dataclass(frozen=True, slots=True, eq=False)
class W4A8Tensor(PackedTensor):
    """A weight [N, K] in two-level INT4."""

    codes: Tensor
    """uint8 [N, K/2], as in `INT4Tensor`."""
    group_scale: Tensor
    """float32 [N, K/g]."""
    tensor_scale: Tensor
    """float32 scalar."""

    @property
    def int4(self) -> INT4Tensor:
        """The same weight without its second level."""
        return INT4Tensor(codes=self.codes, group_scale=self.group_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (N, K)."""
        return self.int4.shape

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.int4.group_size


def tensor_scale(packed: INT4Tensor) -> Tensor:
    """The second-level scale of one weight: the largest |code * group scale| / 448.

    Returns:
        float32 scalar on the device of `packed`; 1 where all codes are 0, never below 2**-100.

    Raises:
        InputError: a dtype or shape is not as `INT4Tensor` says.
    """
    int4.require_packed(packed.codes, packed.group_scale)
    target = int4.kernel_target(packed.codes.device, packed.group_size)
    if target is None or not packed.codes.numel():
        return _torch.tensor_scale(packed.codes, packed.group_scale)
    from autoq.kernels._launch import int4 as launch

    largest = launch.largest(packed.codes, packed.group_scale, target=target)
    return scale_from_amax(largest.amax(), fp8.LARGEST)


def quantize(
    weight: Tensor,
    group_scale: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    group_size: int = GROUP_SIZE,
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> W4A8Tensor:
    """Codes of `int4.quantize`, and both levels of scales.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        group_scale: float32 [N, groups] from `int4.group_scale`, which is called with the last two
            arguments if it is left out; they are not read otherwise.
        tensor_scale: float32 scalar; that of this weight alone if left out, so weights that an
            engine fuses need it given.
        group_size: columns that share a scale; even.
        storage_dtype: dtype to which the group scales are rounded.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    packed = int4.quantize(weight, group_scale, group_size, storage_dtype=storage_dtype)
    scale = _checked_tensor_scale(packed, tensor_scale)
    return W4A8Tensor(codes=packed.codes, group_scale=packed.group_scale, tensor_scale=scale)


def dequantize(packed: W4A8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """e4m3(code * rate) * tensor_scale [N, K]: the weight that an INT4 x FP8 matrix unit sees.

    Computed in float32 and rounded once to `dtype`.

    Raises:
        InputError: a dtype, shape or scale is not as `W4A8Tensor` says, or `dtype` is not float32,
            bfloat16 or float16.
    """
    scale = _require_packed(packed)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    target = int4.kernel_target(packed.codes.device, packed.group_size)
    if target is None:
        return _torch.dequantize(packed.codes, packed.group_scale, scale, dtype)
    from autoq.kernels._launch import int4 as launch

    return launch.dequantize(packed.codes, packed.group_scale, scale, dtype, target=target)


def fake_quantize(
    weight: Tensor,
    group_scale: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    group_size: int = GROUP_SIZE,
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize(quantize(weight, ...), weight.dtype)`, bit for bit.

    With the tensor scale given, no codes are stored. Args and errors are those of `quantize`. No
    gradient flows through the result.
    """
    if tensor_scale is None:
        packed = quantize(weight, group_scale, None, group_size, storage_dtype=storage_dtype)
        return dequantize(packed, weight.dtype)
    group_size = int4.checked_group_size(weight, group_scale, group_size, storage_dtype)
    require_scale("tensor_scale", tensor_scale)
    tensor_scale = tensor_scale.to(weight.device)
    target = int4.kernel_target(weight.device, group_size)
    if target is None:
        if group_scale is None:
            group_scale = int4.group_scale(weight, group_size, storage_dtype=storage_dtype)
        return _torch.fake_quantize(weight, group_scale, tensor_scale)
    from autoq.kernels._launch import int4 as launch

    return launch.fake_quantize(
        weight.detach(), group_scale, tensor_scale, group_size, storage_dtype, target=target
    )


def linear(
    x: Tensor,
    weight: W4A8Tensor | INT4Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, the input quantised to FP8.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        input_scale: float32 scalar for the whole input; None: every row has its own, amax / 448.
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On CPUs bit for bit `functional.linear` of what `fake_quantize` of the input and
        `dequantize` of the weight return in the dtype of `x`. GPU kernels multiply E4M3 numbers,
        exactly, and scale float32 sums. No gradient flows through it.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    require_record("weight", weight, W4A8Tensor, INT4Tensor)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    int4.require_linear(
        x, weight if isinstance(weight, INT4Tensor) else weight.int4, bias, out_dtype
    )
    scaling = fp8.Scaling.ROW if input_scale is None else fp8.Scaling.TENSOR
    target = triton_target(x.device)
    if target is not None and int4.has_product(weight.group_size):
        packed = fp8.quantize(x, input_scale, scaling=scaling)
        return _launch_linear(packed, weight, bias, out_dtype, target)
    values = fp8.fake_quantize(x, input_scale, scaling=scaling)
    if isinstance(weight, INT4Tensor):
        dequantized = int4.dequantize(weight, x.dtype)
    else:
        dequantized = dequantize(weight, x.dtype)
    return _torch_int4.product(values, dequantized, bias, out_dtype)


def _launch_linear(
    x: fp8.FP8Tensor,
    weight: W4A8Tensor | INT4Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    target: Target,
) -> Tensor:
    from autoq.kernels._launch import int4 as element_wise
    from autoq.kernels._launch import int4_matmul as launch
    from autoq.kernels._launch.int4_variant import Kernel, Product, variant

    n, k = weight.shape
    tensor_scale = None
    if isinstance(weight, W4A8Tensor):
        tensor_scale = _require_packed(weight)
        rows = x.codes.numel() // k if k else 0
        if variant(target, rows, n, k, Product.TWO_LEVEL).kernel is Kernel.UNPACKED:
            codes = element_wise.to_e4m3(
                weight.codes, weight.group_scale, tensor_scale, target=target
            )
            unpacked = fp8.FP8Tensor(codes, tensor_scale, fp8.Scaling.TENSOR)
            return fp8.matmul(x, unpacked, bias, out_dtype=out_dtype)
    return launch.matmul(
        x.codes,
        weight.codes,
        weight.group_scale,
        bias,
        out_dtype,
        row_scale=x.scale,
        tensor_scale=tensor_scale,
        target=target,
    )


def _checked_tensor_scale(packed: INT4Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return tensor_scale(packed)
    require_scale("tensor_scale", scale)
    return scale.to(packed.codes.device)


def _require_packed(packed: W4A8Tensor) -> Tensor:
    """Refuse what is not as `W4A8Tensor` says; its tensor scale on the device of its codes."""
    require_record("packed", packed, W4A8Tensor)
    int4.require_packed(packed.codes, packed.group_scale)
    require_scale("tensor_scale", packed.tensor_scale)
    return packed.tensor_scale.to(packed.codes.device)
