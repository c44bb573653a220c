"""What scoring's sums mean: float64, nothing fused, the truth that fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._reference import fp8, nvfp4
from autoq.kernels._scaling import Scaling
from autoq.kernels._scheme import Scheme


def fake_quantize(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """What `scheme` leaves of a matrix."""
    if scheme is Scheme.NVFP4:
        assert scale is not None
        return nvfp4.fake_quantize(x, scale)
    if scheme is Scheme.FP8_ROW:
        return fp8.fake_quantize(x, fp8.scales(x, Scaling.ROW), Scaling.ROW)
    assert scale is not None
    return fp8.fake_quantize(x, scale)


def statistics(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(amax [K], float64 sums [3, K]): of |x|, x**2 and (values - x)**2 along the first dimension."""
    exact, error = x.double(), values.double() - x.double()
    sums = torch.stack([exact.abs().sum(0), exact.square().sum(0), error.square().sum(0)])
    amax = exact.abs().amax(0) if len(x) else torch.zeros(x.shape[1])
    return amax.float(), sums


def project(
    output_gradient: Tensor,
    weight_error: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    """sum over k of (output_gradient @ weight_error) * changed + (changed - exact) * gradient."""
    product = output_gradient.double() @ weight_error.double()
    terms = product * changed.double() + (changed.double() - exact.double()) * input_gradient
    return terms.sum(1)


def weight_error(
    weight: Tensor, scheme: Scheme, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """fake_quantize(W) - W in float32, rounded to `dtype`."""
    return (fake_quantize(weight.float(), scheme, scale) - weight.float()).to(dtype)
