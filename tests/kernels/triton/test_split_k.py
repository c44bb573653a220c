"""Products cut along K: the second kernel against torch, and how many parts there are."""

import pytest
import torch

from autoq.kernels._launch import split_k

SHAPES = [(1, 1), (1, 300), (7, 129), (64, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales", ["none", "shared", "own"])
def test_parts_are_added_in_order_and_scaled(scales, shape, dtype, device, assert_same_bits):
    m, n = shape
    generator = torch.Generator().manual_seed(1)
    partial = torch.randn(3, m, n, generator=generator).to(device)
    rows, columns = torch.rand(m, 1, generator=generator), torch.rand(n, 1, generator=generator)
    rows, columns = (scale.to(device) for scale in (rows, columns))
    bias = None if scales == "none" else torch.randn(n, generator=generator).to(device, dtype)
    row_scale = {"none": None, "shared": rows[0, 0], "own": rows}[scales]
    column_scale = {"none": None, "shared": columns[0, 0], "own": columns}[scales]
    out = torch.empty(m, n, dtype=dtype, device=device)
    split_k.reduce(partial, out, row_scale=row_scale, column_scale=column_scale, bias=bias)
    sums = partial[0] + partial[1] + partial[2]
    if row_scale is not None:
        sums = sums * column_scale.view(-1) * row_scale.view(-1, 1)
    if bias is not None:
        # The compiler may fuse the last two operations.
        expected = (sums.double() + bias.double()).float().to(dtype)
        torch.testing.assert_close(out, expected, rtol=0.01, atol=1e-6)
        return
    assert_same_bits(out, sums.to(dtype))


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 4096, 4096, 4),  # 64 tiles: four parts make 256 programs
        (64, 4096, 4096, 2),  # more would write more than a quarter of what is read
        (1, 65536, 8192, 1),  # enough tiles
        (1, 128, 512, 1),  # too short to cut
        (1, 128, 16384, 32),
        (0, 0, 0, 1),
    ],
)
def test_parts(m, n, k, expected):
    assert split_k.parts(m, n, k, block_m=64, block_n=64) == expected
