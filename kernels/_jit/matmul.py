"""What all matrix products share: the order of tiles, their part of K, and the way out."""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) in tiles of a program: GROUP_M rows of tiles are walked column by column.

    Programs that run together then share rows of both operands in the level-2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first_row = program // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first_row, GROUP_M)
    place = program % (GROUP_M * tiles_n)
    return first_row + place % rows, place // rows


@triton.jit
def part_of(part, blocks, SPLIT_K: tl.constexpr):
    """(first, end) of the blocks along K that one of SPLIT_K parts sums; it may be empty."""
    blocks_per_part = tl.cdiv(blocks, SPLIT_K)
    first = part * blocks_per_part
    return first, tl.minimum(first + blocks_per_part, blocks)


@triton.jit
def finished(
    sums,
    rows,
    columns,
    inside_rows,
    inside_columns,
    row_scale_ptr,
    row_scale_stride,
    column_scale_ptr,
    column_scale_stride,
    bias_ptr,
):
    """sums * column scale * row scale + bias, the scale of the weight first.

    What a null pointer stands for is left out; a stride of 0 is a scalar that all share. `rows` and
    `columns` and what is inside must broadcast to `sums`. The product of both scales could
    underflow where their turn-by-turn product with the sum does not.
    """
    if column_scale_ptr is not None:
        places = column_scale_ptr + columns * column_scale_stride
        sums *= tl.load(places, mask=inside_columns, other=0.0)
    if row_scale_ptr is not None:
        places = row_scale_ptr + rows * row_scale_stride
        sums *= tl.load(places, mask=inside_rows, other=0.0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + columns, mask=inside_columns, other=0.0).to(tl.float32)
    return sums
