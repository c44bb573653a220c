"""What the numeric operations demand of their operands, checked once at the edge."""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from autoq.errors import InputError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SMALLEST_SCALE = 2.0**-100
"""No scale is smaller. An E4M3 block scale goes down to 2**-9, so products of two scales stay
normal float32 numbers, which every device treats alike; weights that small do not occur."""

EMPTY_GROUP_SCALE = 2.0**-24
"""Scale of an INT4 group whose codes are all zero: the smallest that float16 holds. Engines divide
group scales by a second-level scale in float16, where 1 could overflow, and infinity times code 0
is NaN."""

LARGEST_FLOAT16 = 65504.0


def require_record(name: str, value: object, *kinds: type) -> None:
    """Refuse what is not a packed tensor of one of these kinds."""
    if not isinstance(value, kinds):
        known = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"{name} must be {known}, got {type(value).__name__}; take what quantize returned"
        )


def require_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Refuse a tensor of another dtype than `allowed`."""
    if tensor.dtype not in allowed:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} must be {known}, got {got}; convert it first")


def require_float(name: str, tensor: Tensor) -> None:
    """Refuse what is not a float32, bfloat16 or float16 tensor of at least one dimension."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}; make it one")
    require_dtype(name, tensor, *FLOAT_DTYPES)
    if tensor.ndim == 0:
        raise InputError(f"{name} must have at least one dimension, got a scalar; give it one")


def require_matrix(name: str, tensor: Tensor) -> None:
    """Refuse what does not have two dimensions."""
    if tensor.ndim != 2:
        raise InputError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}; reshape it")


def require_multiple(name: str, size: int, block: int) -> None:
    """Refuse a size that blocks of `block` do not fill."""
    if size % block:
        raise InputError(f"{name} must be a multiple of {block}, got {size}; pad it or use fp8")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{name} must have shape {shape}, got {tuple(tensor.shape)}; "
            "take the pair that one call of quantize returned"
        )


def require_scale(name: str, scale: Tensor) -> None:
    """Refuse what is not a float32 scalar; on the CPU also one that no scale function returns.

    On other devices the value is not read, because that would wait for the device.
    """
    require_dtype(name, scale, torch.float32)
    require_shape(name, scale, ())
    if scale.device.type == "cpu":
        value = scale.item()
        if not SMALLEST_SCALE <= value < math.inf:
            raise InputError(f"{name} must be finite and at least 2**-100, got {value}; check amax")


def require_scales(name: str, scale: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not float32 of that shape; on the CPU also scales that are too small.

    NaN and infinity pass: they are what a tensor that holds them gets.
    """
    require_dtype(name, scale, torch.float32)
    require_shape(name, scale, shape)
    if scale.device.type == "cpu" and bool((scale < SMALLEST_SCALE).any()):
        lowest = scale[scale < SMALLEST_SCALE].min().item()
        raise InputError(f"{name} must be at least 2**-100, got {lowest}; compute it from amax")


def require_importance(importance: Tensor, matrix: Tensor) -> None:
    """Refuse weights of errors that are not float32, one per column of `matrix`."""
    require_dtype("importance", importance, torch.float32)
    require_shape("importance", importance, tuple(matrix.shape[-1:]))


def require_bias(bias: Tensor | None, out_features: int) -> None:
    """Refuse a bias that is not a floating vector of one number per output."""
    if bias is not None:
        require_dtype("bias", bias, *FLOAT_DTYPES)
        if tuple(bias.shape) != (out_features,):
            raise InputError(
                f"bias must have shape {(out_features,)}, got {tuple(bias.shape)}; "
                "give one number per row of the weight"
            )


def require_member(name: str, value: object, kind: type[StrEnum]) -> None:
    """Refuse what is not a member of an enumeration: the name of one would pass for another."""
    if not isinstance(value, kind):
        known = " or ".join(f"{kind.__name__}.{member.name}" for member in kind)
        raise InputError(f"{name} must be {known}, got {value!r}; choose one")


def require_same_device(*tensors: Tensor | None) -> None:
    """Refuse operands on different devices; None is no operand."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise InputError(f"operands must be on one device, got {names}; move them together")


def checked_amax(amax: float | Tensor) -> Tensor:
    """`amax` as a float32 scalar tensor.

    Raises:
        InputError: it is not one number, negative, NaN or infinite.
    """
    scalar = torch.as_tensor(amax, dtype=torch.float32)
    if scalar.numel() != 1:
        raise InputError(f"amax must be one number, got shape {tuple(scalar.shape)}; reduce it")
    value = scalar.item()
    if not 0.0 <= value < math.inf:
        raise InputError(f"amax must be finite and not negative, got {value}; check the tensor")
    return scalar.reshape(())
