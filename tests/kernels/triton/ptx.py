"""Inline PTX in triton's interpreter: the few instructions that kernels here write, in numpy.

An instruction is executed as its text says, so a wrong operand, mask or constant shows. What it
does is taken from the PTX ISA, and only a GPU can say that this is so.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
from interpreter import encode, fma
from triton.runtime import interpreter

_LINE = re.compile(r"^([a-z][\w.]*)\s+(.*)$")
_NUMBER = re.compile(r"^(?:0f([0-9A-Fa-f]{8})|(0x[0-9A-Fa-f]+|\d+))$")


def install() -> None:
    """Have the interpreter execute inline PTX instead of refusing it."""

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        shape = values[0].data.shape
        inputs = [
            word for value in values for word in _words(np.ascontiguousarray(value.data), pack)
        ]
        outputs = constraints.count("=")
        registers = {f"${outputs + place}": word for place, word in enumerate(inputs)}
        _execute(text, registers)
        results, first = [], 0
        for kind in types:
            scalar = kind.scalar
            numpy_type = interpreter._get_np_dtype(scalar)
            size = max(1, np.dtype(numpy_type).itemsize * pack // 4)
            words = np.stack([registers[f"${first + place}"] for place in range(size)], axis=-1)
            first += size
            data = words.view(numpy_type).reshape(shape)
            results.append(interpreter.TensorHandle(data, scalar))
        return SimpleNamespace(get_result=lambda place: results[place])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


def _words(data: np.ndarray, pack: int) -> list[np.ndarray]:
    """Registers of 32 bits that hold `pack` neighbouring elements, each a flat array."""
    packs = data.reshape(-1, pack)
    words = packs.view(np.uint32) if packs.itemsize * pack % 4 == 0 else None
    assert words is not None, "elements that do not fill registers"
    return [words[:, place].copy() for place in range(words.shape[1])]


def _execute(text: str, registers: dict[str, np.ndarray]) -> None:
    lines = [line.partition("//")[0].strip() for line in re.split(r"[;\n]", text)]
    for line in lines:
        if not line or line in "{}" or line.startswith(".reg"):
            continue
        matched = _LINE.match(line)
        assert matched, f"unreadable PTX: {line}"
        operation, operands = matched[1], _operands(matched[2])
        function = _OPERATIONS.get(operation)
        assert function is not None, f"{operation} is not known to the emulation"
        values = [_value(operand, registers) for operand in operands[1:]]
        registers[operands[0]] = function(*values)


def _operands(text: str) -> list[str]:
    text = re.sub(r"\{[\w,\s]+\}", lambda parts: re.sub(r",\s*", "&", parts[0][1:-1]), text)
    return [operand.strip() for operand in text.split(",")]


def _value(operand: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    number = _NUMBER.match(operand)
    if number:
        return np.uint32(int(number[1], 16) if number[1] else int(number[2], 0))
    if "&" in operand:
        parts = [registers[name].astype(np.uint32) for name in operand.split("&")]
        width = 32 // len(parts)
        return sum(part << np.uint32(width * place) for place, part in enumerate(parts))
    return registers[operand]


def _permute(low, high, selector):
    """prmt.b32: bytes of two words; bit 3 of a selector repeats the sign of the byte."""
    low, high, selector = np.broadcast_arrays(low, high, selector)
    pool = np.ascontiguousarray(np.stack((low, high), axis=-1)).view(np.uint8)
    result = np.zeros(selector.shape, np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        chosen = np.take_along_axis(pool, (nibble & 7).astype(np.int64)[..., None], -1)[..., 0]
        sign = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        byte = np.where(nibble & 8, sign, chosen).astype(np.uint32)
        result |= byte << np.uint32(8 * place)
    return result


def _logic(first, second, third, table):
    """lop3.b32: every bit by the truth table, whose bits count first * 4 + second * 2 + third."""
    first, second, third = np.broadcast_arrays(first, second, third)
    result = np.zeros(first.shape, np.uint32)
    for case in range(8):
        if int(table) >> case & 1:
            parts = (
                part if case >> shift & 1 else ~part
                for part, shift in ((first, 2), (second, 1), (third, 0))
            )
            result |= np.bitwise_and.reduce(list(parts))
    return result


def _halves(word) -> np.ndarray:
    return np.ascontiguousarray(word).view(np.uint16)


def _fma_float16(x, y, z):
    x, y, z = np.broadcast_arrays(x, y, z)
    return fma(*(_halves(part).view(np.float16) for part in (x, y, z))).view(np.uint32)


def _fma_bfloat16(x, y, z):
    x, y, z = np.broadcast_arrays(x, y, z)
    # Products of bfloat16 are exact in float32; what is summed here is as well, or the test says so.
    x, y, z = (
        (_halves(part).astype(np.uint32) << np.uint32(16)).view(np.float32) for part in (x, y, z)
    )
    exact = x.astype(np.float64) * y + z
    rounded = torch.from_numpy(exact).float().bfloat16()
    assert np.array_equal(rounded.double().numpy(), exact), "rounded twice by the emulation"
    return rounded.view(torch.int16).numpy().view(np.uint32)


def _convert(high, low):
    """cvt.rn.satfinite.e4m3x2.f32, the first operand in the upper byte."""
    import triton.language as tl

    high, low = (encode(part.view(np.float32), tl.float8e4nv) for part in (high, low))
    return high.astype(np.uint16) << np.uint16(8) | low.astype(np.uint16)


def _convert_e2m1(high, low):
    """cvt.rn.satfinite.e2m1x2.f32, the first operand in the upper nibble; NaN becomes 6."""
    return _e2m1(high) << np.uint32(4) | _e2m1(low)


def _e2m1(word):
    number = word.view(np.float32)
    size = np.where(np.isnan(number), np.float32(np.inf), np.abs(number))
    # Between two codes ties go to the even one.
    code = np.sum([size > 0.25, size >= 0.75, size > 1.25, size >= 1.75], axis=0)
    code += np.sum([size > 2.5, size >= 3.5, size > 5.0], axis=0)
    sign = np.signbit(number) & ~np.isnan(number)
    return (code | np.where(sign, 8, 0)).astype(np.uint32)


def _multiply(x, y):
    return (x.view(np.float32) * np.asarray(y).view(np.float32)).view(np.uint32)


_OPERATIONS = {
    "mov.b32": lambda x: x,
    "not.b32": lambda x: ~x,
    "and.b32": lambda x, y: x & y,
    "or.b32": lambda x, y: x | y,
    "xor.b32": lambda x, y: x ^ y,
    "add.u32": lambda x, y: x + y,
    "mul.lo.u32": lambda x, y: x * y,
    "shl.b32": lambda x, y: x << y,
    "shr.u32": lambda x, y: x >> y,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
    "mul.f32": _multiply,
    "fma.rn.f16x2": _fma_float16,
    "fma.rn.bf16x2": _fma_bfloat16,
    "cvt.rn.satfinite.e4m3x2.f32": _convert,
    "cvt.rn.satfinite.e2m1x2.f32": _convert_e2m1,
}
