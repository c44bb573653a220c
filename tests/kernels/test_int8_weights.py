"""INT8 weights for inputs as they are: stored scales, packed columns, products."""

import pytest
import torch
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import int8


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_row_scales_are_rounded_to_the_dtype_they_are_stored_in():
    weight = torch.tensor([[127.0, -1.0], [0.5, -254.0], [0.0, 0.0], [1.0, 0.25]])
    # 1 / 127 = 2**-7 * 1.00787...; bfloat16 has seven bits of fraction: 1.0078125.
    expected = torch.tensor([[1.0], [2.0], [1.0], [1.0078125 / 128]])
    assert torch.equal(int8.row_scale(weight, storage_dtype=torch.bfloat16), expected)
    assert int8.row_scale(weight)[3].item() == pytest.approx(1 / 127, rel=1e-7)


def test_float16_scales_do_not_vanish():
    # 1e-6 / 127 is below half of float16's smallest number, 2**-24.
    weight = torch.full((1, 4), 1e-6)
    assert int8.row_scale(weight, storage_dtype=torch.float16).item() == 2.0**-24
    assert torch.isfinite(int8.fake_quantize(weight, torch.tensor([[2.0**-24]]))).all()


def test_columns_pack_as_code_plus_128_the_first_lowest():
    # Bytes 80 81 7F FF, and 01 00+128=80 ...: -127 + 128 = 1, -128 + 128 = 0.
    codes = torch.tensor([[0, 1, -1, 127], [-127, -128, 2, -2]], dtype=torch.int8)
    packed = int8.pack_columns(codes)
    assert packed.dtype is torch.int32
    assert [word & 0xFFFFFFFF for word in packed.flatten().tolist()] == [0xFF7F8180, 0x7E820001]
    assert torch.equal(int8.unpack_columns(packed), codes)


def test_columns_pack_as_the_library_of_the_container_packs_them():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-127, 128, (5, 36), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.int8)
    assert torch.equal(int8.pack_columns(codes), helpers.pack_to_int32(codes, 8))


def test_views_pack_as_their_copies():
    codes = torch.arange(-32, 32, dtype=torch.int8).reshape(8, 8)
    assert torch.equal(int8.pack_columns(codes[2:6]), int8.pack_columns(codes[2:6].clone()))
    assert torch.equal(int8.pack_columns(codes.T), int8.pack_columns(codes.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_as_they_are_meet_the_dequantised_weight(bias, dtype):
    x, weight = normal(5, 40).to(dtype), int8.quantize(normal(6, 40, seed=1))
    offset = normal(6) if bias else None
    simulated = functional.linear(
        x, int8.dequantize(weight, dtype), None if offset is None else offset.to(dtype)
    )
    assert torch.equal(int8.linear(x, weight, offset, quantize_input=False), simulated)
    assert not torch.equal(int8.linear(x, weight, offset), simulated)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: int8.pack_columns(torch.zeros(2, 6, dtype=torch.int8)), "multiple of 4, got 6"),
        (lambda: int8.pack_columns(torch.zeros(2, 8)), "codes must be int8, got float32"),
        (lambda: int8.unpack_columns(torch.zeros(2, 8, dtype=torch.int8)), "must be int32"),
        (lambda: int8.row_scale(torch.zeros(8)), "weight must be a matrix"),
        (
            lambda: int8.row_scale(torch.zeros(2, 8), storage_dtype=torch.int8),
            "the stored scale must be float32",
        ),
    ],
)
def test_wrong_operands_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
