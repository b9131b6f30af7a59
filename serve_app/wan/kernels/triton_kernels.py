"""Kernels in Triton; importing this needs Triton, which comes with torch for CUDA."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton import next_power_of_2

__all__ = ["next_power_of_2", "norm_modulate", "norm_rotate", "square_sums"]


# The number of tokens differs by video: specialized for, some requests would wait for a compiler.
@triton.jit(do_not_specialize=["tokens"])
def norm_rotate(
    hidden,
    weight,
    squares,
    cos,
    sin,
    output,
    tokens,
    features,
    eps,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """One token a program: RMSNorm over its heads, then the rotation of neighbours within each.

    `MANY` and `WIDE` are `HEADS` and `HEAD` up to powers of two. `GIVEN`: the sum of squares is read, not computed.
    """
    row = tl.program_id(0).to(tl.int64)
    heads, within = tl.arange(0, MANY)[:, None], tl.arange(0, WIDE)[None, :]
    place = heads * HEAD + within
    inside = (heads < HEADS) & (within < HEAD)
    values = tl.load(hidden + row * HEADS * HEAD + place, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:  # noqa: SIM108, a choice for the compiler
        total = tl.load(squares + row)
    else:
        total = tl.sum(tl.sum(values * values, axis=1), axis=0)
    scale = tl.rsqrt(total / features + eps)
    scaled = values * scale * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    # A norm's result has the dtype of its input.
    scaled = scaled.to(output.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(tl.reshape(scaled, (MANY, WIDE // 2, 2)))
    pair = tl.arange(0, WIDE // 2)
    angle = (row % tokens) * HEAD + 2 * pair
    cosine = tl.load(cos + angle, mask=pair < HEAD // 2, other=0.0)[None, :]
    sine = tl.load(sin + angle + 1, mask=pair < HEAD // 2, other=0.0)[None, :]
    rotated = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(
        output + row * HEADS * HEAD + place,
        tl.reshape(rotated, (MANY, WIDE)).to(output.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["tokens", "stride", "first"])
def square_sums(
    hidden,
    output,
    tokens,
    stride,
    first,
    WIDTH: tl.constexpr,
    SOME: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` tokens of a sample a program: each one's sum of squares, read `SOME` features at a time.

    Those of a sample lie `stride` from those of the next one, and begin with `first`.
    """
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < tokens
    sums = tl.zeros((ROWS, SOME), tl.float32)
    for begin in tl.static_range(0, WIDTH, SOME):
        place = begin + tl.arange(0, SOME)[None, :]
        at = hidden + (sample * tokens + rows)[:, None] * WIDTH + place
        values = tl.load(at, mask=here[:, None] & (place < WIDTH), other=0.0).to(tl.float32)
        sums += values * values
    tl.store(output + sample * stride + first + rows, tl.sum(sums, axis=1), mask=here)


@triton.jit(do_not_specialize=["tokens", "first"])
def norm_modulate(
    hidden,
    added,
    modulation,
    total,
    output,
    tokens,
    first,
    eps,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    ADDED: tl.constexpr,
):
    """`ROWS` tokens of a sample a program: the sum with `added`, if there is one, LayerNorm of it, scale and shift.

    `modulation` has `KINDS` rows for a sample, the shift at `first`, the scale behind it. `WIDE` is `WIDTH` up to a
    power of two.
    """
    sample = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, WIDE)
    within = place < WIDTH
    shift_at = modulation + (sample * KINDS + first) * WIDTH + place
    shift = tl.load(shift_at, mask=within, other=0.0)
    scale = 1 + tl.load(shift_at + WIDTH, mask=within, other=0.0)
    for number in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + number
        at = (sample * tokens + row) * WIDTH + place
        inside = within & (row < tokens)
        values = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        if ADDED:
            values += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + at, values.to(total.dtype.element_ty), mask=inside)
            values = values.to(total.dtype.element_ty).to(tl.float32)  # what the next sum begins with
        centred = tl.where(inside, values - tl.sum(values, axis=0) / WIDTH, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        tl.store(output + at, (centred * deviation * scale + shift).to(output.dtype.element_ty), mask=inside)
