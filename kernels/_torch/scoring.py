"""Scoring's sums in vectorised torch, a cache-sized piece at a time, on any device.

Operands were checked by `autoq.kernels.scoring`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoq.kernels._scaling import Scaling
from autoq.kernels._scheme import Scheme
from autoq.kernels._torch import fp8, nvfp4
from autoq.kernels._torch.chunks import rows_per_piece

# Measured: below, more calls cost more than the caches give; above, several times as little.
_MOST_ELEMENTS_AT_ONCE = 2**20
# Float32 numbers of a piece of the product [T, K]: its few passes then stay in a cache.
_PRODUCT_ELEMENTS = 2**20
# Narrower pieces make matrix products slow (measured); a multiple of NVFP4's blocks of 16.
_NARROWEST = 512


def fake_quantize(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """What `scheme` leaves of a matrix."""
    if scheme is Scheme.NVFP4:
        assert scale is not None
        return nvfp4.fake_quantize(x, scale)
    return fp8.fake_quantize(x, scale, Scaling.ROW if scheme is Scheme.FP8_ROW else Scaling.TENSOR)


def fake_quantize_with_statistics(
    x: Tensor, scheme: Scheme, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, amax [K], float64 sums [3, K]): of |x|, x**2 and (values - x)**2."""
    values = fake_quantize(x, scheme, scale)
    return values, *_statistics(x, values)


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(amax [K], float64 sum of |x| [K])."""
    amax, sums = _statistics(x, None)
    return amax, sums[0]


def _statistics(x: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maxima and sums along the first dimension: float32 within a piece, float64 across them."""
    columns = x.shape[1]
    amax = torch.zeros(columns, device=x.device)
    sums = torch.zeros(1 if values is None else 3, columns, dtype=torch.float64, device=x.device)
    step = rows_per_piece(x) if x.numel() > _MOST_ELEMENTS_AT_ONCE else max(1, len(x))
    scratch = torch.empty(min(step, len(x)), columns, dtype=torch.float32, device=x.device)
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        magnitudes = _magnitudes(rows, scratch[: len(rows)])
        torch.maximum(amax, magnitudes.amax(dim=0), out=amax)
        sums[0] += magnitudes.sum(dim=0)
        if values is not None:
            sums[1] += magnitudes.square_().sum(dim=0)
            error = magnitudes.copy_(values[start : start + step]).sub_(rows)
            sums[2] += error.square_().sum(dim=0)
    return amax, sums


def _magnitudes(rows: Tensor, out: Tensor) -> Tensor:
    if rows.dtype == torch.float32:
        return torch.abs(rows, out=out)
    return out.copy_(rows).abs_()


def project(
    output_gradient: Tensor,
    weight_error: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    """Sums over k of (output_gradient @ weight_error) * changed + (changed - exact) * gradient."""

    def error_of(columns: slice) -> Tensor:
        return weight_error[:, columns]

    return _project(output_gradient, error_of, changed, exact, input_gradient)


def project_weight(
    output_gradient: Tensor,
    weight: Tensor,
    scheme: Scheme,
    scale: Tensor | None,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    """`project` with the error that `scheme` makes of a weight, a few columns at a time."""

    def error_of(columns: slice) -> Tensor:
        piece = weight[:, columns].float()
        return (fake_quantize(piece, scheme, scale) - piece).to(output_gradient.dtype)

    return _project(output_gradient, error_of, changed, exact, input_gradient)


def _project(
    output_gradient: Tensor,
    error_of: Callable[[slice], Tensor],
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
) -> Tensor:
    rows, columns = changed.shape
    total = torch.zeros(rows, device=changed.device)
    width = max(_NARROWEST, _PRODUCT_ELEMENTS // max(1, rows) // 16 * 16)
    for start in range(0, columns, width):
        piece = slice(start, start + width)
        product = (output_gradient @ error_of(piece)).float()
        inputs = changed[:, piece].float()
        terms = torch.sub(inputs, exact[:, piece].float()).mul_(input_gradient[:, piece])
        total += terms.addcmul_(product, inputs).sum(dim=1)
    return total
