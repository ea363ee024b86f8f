"""The kernels of `grouped_product.py`.

A program computes some columns of an expert's outputs, for all of its rows.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rows_of(ends, expert):
    """The first row of an expert, and the one after its last."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)


@triton.jit
def product(
    x, weight, ends, out, O, I, x_row, x_column, weight_expert, weight_row, weight_column,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (n, O) = x (n, I) · Wₑᵀ, of W (E, O, I)."""
    expert = tl.program_id(1)
    start, stop = rows_of(ends, expert)
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight += expert.to(tl.int64) * weight_expert
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, I, INNER):
            i = begin + tl.arange(0, INNER)
            a = tl.load(
                x + row[:, None] * x_row + i[None, :] * x_column,
                mask=(row[:, None] < stop) & (i[None, :] < I),
                other=0.0,
            )
            b = tl.load(
                weight + i[:, None] * weight_column + o[None, :] * weight_row,
                mask=(i[:, None] < I) & (o[None, :] < O),
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
        there = (row[:, None] < stop) & (o[None, :] < O)
        tl.store(out + row[:, None] * O + o[None, :], total.to(out.dtype.element_ty), mask=there)


@triton.jit
def outer_product(
    left, right, ends, out, O, I, left_row, left_column, right_row, right_column,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (E, O, I) = Lₑᵀ Rₑ, of L (n, O) and R (n, I); zero for an expert without rows."""
    expert = tl.program_id(1)
    start, stop = rows_of(ends, expert)
    across = tl.cdiv(I, INNER)
    o = tl.program_id(0) // across * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.program_id(0) % across * INNER + tl.arange(0, INNER)
    total = tl.zeros((COLUMNS, INNER), tl.float32)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        a = tl.load(
            left + row[None, :] * left_row + o[:, None] * left_column,
            mask=(row[None, :] < stop) & (o[:, None] < O),
            other=0.0,
        )
        b = tl.load(
            right + row[:, None] * right_row + i[None, :] * right_column,
            mask=(row[:, None] < stop) & (i[None, :] < I),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out += expert.to(tl.int64) * O * I
    tl.store(
        out + o[:, None] * I + i[None, :],
        total.to(out.dtype.element_ty),
        mask=(o[:, None] < O) & (i[None, :] < I),
    )
