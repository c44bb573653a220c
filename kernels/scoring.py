"""What calibration and sensitivity sum up, without writing what is summed to memory.

Statistics come with the fake-quantised values from one pass over an input; projections multiply,
scale and reduce a matrix product that exists a tile at a time only. Sums are deterministic: the
same operands give the same bits on the same machine, because partial sums are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autoq.errors import InputError
from autoq.kernels import nvfp4
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    require_dtype,
    require_float,
    require_matrix,
    require_member,
    require_multiple,
    require_same_device,
    require_scale,
)
from autoq.kernels._scheme import Scheme
from autoq.kernels._torch import scoring as _torch
from autoq.kernels.dispatch import triton_target

__all__ = [
    "ChannelStatistics",
    "Scheme",
    "fake_quantize_with_statistics",
    "input_statistics",
    "project",
    "project_weight",
]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStatistics:
    """What fake-quantising an input x [T, K] did to each of its channels.

    Sums are float32 over up to some thousand rows, and float64 across those.
    """

    amax: Tensor
    """float32 [K]: the largest |x|; infinity or NaN where x has one."""
    absolute_sum: Tensor
    """float64 [K]: of |x|."""
    square_sum: Tensor
    """float64 [K]: of x**2."""
    error_square_sum: Tensor
    """float64 [K]: of (value - x)**2, with the values as they are returned."""


def fake_quantize_with_statistics(
    x: Tensor, scheme: Scheme, scale: Tensor | None = None
) -> tuple[Tensor, ChannelStatistics]:
    """Fake-quantise an input, and sum up per channel what it was and what was lost.

    Args:
        x: float32, bfloat16 or float16 [T, K]; K a multiple of 16 for NVFP4.
        scheme: how `x` is quantised.
        scale: float32 scalar, the tensor's scale or global scale; None for FP8_ROW.

    Returns:
        The values, bit for bit those of the family's `fake_quantize`, in the shape and dtype of
        `x`, and the statistics. No gradient flows through them.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    _require_input(x)
    scale = _checked_scale("x", x, scheme, scale)
    x = x.detach()
    target = triton_target(x.device)
    if target is None:
        values, amax, sums = _torch.fake_quantize_with_statistics(x, scheme, scale)
    else:
        from autoq.kernels._launch import scoring as launch

        values, amax, sums = launch.fake_quantize_with_statistics(x, scheme, scale, target=target)
    return values, ChannelStatistics(amax, *sums)


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude and the sum of magnitudes of every channel.

    Args:
        x: float32, bfloat16 or float16 [T, K].

    Returns:
        float32 [K], infinity or NaN where x has one, and float64 [K].

    Raises:
        InputError: the dtype or shape of `x` is not as above.
    """
    _require_input(x)
    x = x.detach()
    target = triton_target(x.device)
    if target is None:
        return _torch.input_statistics(x)
    from autoq.kernels._launch import scoring as launch

    return launch.input_statistics(x, target=target)


def project(
    output_gradient: Tensor,
    weight_error: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    """First-order change of the loss of every token by quantising one layer.

    That is the sum over k of (g dW) x' + (x' - x) (g W), where g dW is a matrix product.

    Args:
        output_gradient: g, float32, bfloat16 or float16 [T, N].
        weight_error: dW = W' - W in the dtype of g, [N, K].
        changed: x', the quantised input, float32, bfloat16 or float16 [T, K].
        exact: x, the input, float32, bfloat16 or float16 [T, K].
        input_gradient: g W, float32, bfloat16 or float16 [T, K].

    Returns:
        float32 [T]. Products of the matrix product are summed in float32; on CPUs the sums are
        rounded to the dtype of g. Everything else is float32. No gradient flows through it.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    _require_projection(output_gradient, "weight_error", weight_error)
    require_dtype("weight_error", weight_error, output_gradient.dtype)
    inputs = _checked_inputs(output_gradient, weight_error, changed, exact, input_gradient)
    operands = output_gradient.detach(), weight_error.detach()
    target = triton_target(output_gradient.device)
    if target is None:
        return _torch.project(*operands, *inputs)
    from autoq.kernels._launch import scoring as launch

    return launch.project(*operands, *inputs, target=target)


def project_weight(
    output_gradient: Tensor,
    weight: Tensor,
    scheme: Scheme,
    scale: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    """`project` with dW = fake_quantize(W) - W, of which only a part is in memory at a time.

    Args:
        output_gradient: g, float32, bfloat16 or float16 [T, N].
        weight: W, float32, bfloat16 or float16 [N, K]; K a multiple of 16 for NVFP4. The error is
            computed in float32 and rounded to the dtype of g.
        scheme: FP8_TENSOR or NVFP4.
        scale: float32 scalar, the weight's scale or global scale.
        changed: x', as for `project`.
        exact: x, as for `project`.
        input_gradient: g W, as for `project`.

    Returns:
        float32 [T], as `project`.

    Raises:
        InputError: a dtype, shape, scale, scheme or device is not as above.
    """
    _require_projection(output_gradient, "weight", weight)
    if scheme is Scheme.FP8_ROW:
        raise InputError("scheme must be fp8_tensor or nvfp4 for weights, got fp8_row; use project")
    own_scale = _checked_scale("weight", weight, scheme, scale)
    inputs = _checked_inputs(output_gradient, weight, changed, exact, input_gradient)
    operands = output_gradient.detach(), weight.detach(), scheme, own_scale
    target = triton_target(output_gradient.device)
    if target is None:
        return _torch.project_weight(*operands, *inputs)
    from autoq.kernels._launch import scoring as launch

    return launch.project_weight(*operands, *inputs, target=target)


def _require_input(x: Tensor) -> None:
    require_float("x", x)
    require_matrix("x", x)


def _checked_scale(
    name: str, matrix: Tensor, scheme: Scheme, scale: Tensor | None
) -> Tensor | None:
    """The scale that `scheme` takes, on the device of `matrix`; None where rows have their own."""
    require_member("scheme", scheme, Scheme)
    if scheme is Scheme.NVFP4:
        require_multiple(f"the last dimension of {name}", matrix.shape[-1], nvfp4.BLOCK)
    if scheme is Scheme.FP8_ROW:
        if scale is not None:
            raise InputError("scale must be left out for fp8_row, got one; rows have their own")
        return None
    if scale is None:
        raise InputError(f"scale must be given for {scheme}, got None; compute it from amax")
    require_scale("scale", scale)
    return scale.to(matrix.device)


def _require_projection(output_gradient: Tensor, name: str, weight: Tensor) -> None:
    require_float("output_gradient", output_gradient)
    require_matrix("output_gradient", output_gradient)
    require_float(name, weight)
    require_matrix(name, weight)
    if weight.shape[0] != output_gradient.shape[1]:
        raise InputError(
            f"{name} must have as many rows as output_gradient has columns, got {weight.shape[0]} "
            f"and {output_gradient.shape[1]}; take the gradient of this very layer"
        )


def _checked_inputs(
    output_gradient: Tensor,
    weight: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (output_gradient.shape[0], weight.shape[1])
    named = {"changed": changed, "exact": exact, "input_gradient": input_gradient}
    for name, tensor in named.items():
        require_dtype(name, tensor, *FLOAT_DTYPES)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} must have shape {shape}, got {tuple(tensor.shape)}; "
                "take the input of this very layer"
            )
    require_same_device(output_gradient, weight, changed, exact, input_gradient)
    return changed.detach(), exact.detach(), input_gradient.detach()
