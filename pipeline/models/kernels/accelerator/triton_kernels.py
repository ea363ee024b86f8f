"""Triton kernels: the cross-entropy of logits, and the weights of four bits.

Compiled for a card on first use. Triton comes with torch's builds for GPUs.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def capped(z, CAP: tl.constexpr):
    """cap·tanh(z / cap); z for a cap of 0."""
    if CAP > 0:
        # tanh by the logistic function, which all versions of Triton have
        z = CAP * (2 * tl.sigmoid(2 * z / CAP) - 1)
    return z


@triton.jit
def cross_entropy(
    logits, labels, losses, V, CAP: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The loss of a row of logits (n, V); in their place softmax − onehot, with GRADIENT.

    Of a label that has no logit it is not a number, and the training stops.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    # before the sums below, at which the program's threads meet: its place is written later
    is_there = (label >= 0) & (label < V)
    wanted = tl.load(logits + label, mask=is_there, other=float("nan")).to(tl.float32)
    wanted = capped(wanted, CAP)
    top, mass = float("-inf"), 0.0
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = capped(tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32), CAP)
        z = tl.where(column < V, z, float("-inf"))
        largest = tl.maximum(top, tl.max(z, 0))
        mass = mass * tl.exp(top - largest) + tl.sum(tl.exp(z - largest), 0)
        top = largest
    tl.store(losses + row, top + tl.log(mass) - wanted)
    if GRADIENT:
        for start in range(0, V, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z = capped(tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32), CAP)
            share = tl.exp(z - top) / mass - tl.where(column == label, 1.0, 0.0)
            if CAP > 0:
                share *= 1 - z * z / (CAP * CAP)
            tl.store(logits + column, share.to(logits.dtype.element_ty), mask=column < V)


@triton.jit
def dequantize_nf4(
    codes, scales, levels, scale_levels, scales_of_scales, offset, out, count,
    BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, DOUBLE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """level[code] · scale of COUNT weights, two codes a byte; with DOUBLE the scales have codes."""
    place = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = place < count
    byte = tl.load(codes + place // 2, mask=there, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    block = place // BLOCK
    if DOUBLE:
        scale = tl.load(scale_levels + tl.load(scales + block, mask=there, other=0).to(tl.int32))
        scale *= tl.load(scales_of_scales + block // SCALE_BLOCK, mask=there, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=there, other=0.0)
    weight = tl.load(levels + code) * scale
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=there)
