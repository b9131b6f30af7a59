"""Kernels in Triton; importing this needs Triton, which comes with torch for CUDA."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton import next_power_of_2

__all__ = ["attend_text", "next_power_of_2", "norm_rotate"]


# What differs by video is not specialized for: a request must not wait for a compiler.
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


@triton.jit(do_not_specialize=["tokens", "texts"])
def attend_text(
    query,
    key,
    value,
    own,
    output,
    tokens,
    texts,
    scale,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """`ROWS` queries of one head and sample a program: softmax as the keys come (FlashAttention's).

    `WIDE` is `HEAD` up to a power of two. `scale` is that of the logits, for powers of two. The key behind the first
    `own` stands for all that follow, which are never read.
    """
    sample = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * HEAD
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, WIDE)
    place = (sample * tokens + rows)[:, None] * (HEADS * HEAD) + start + within[None, :]
    inside = (rows[:, None] < tokens) & (within[None, :] < HEAD)
    queries = tl.load(query + place, mask=inside, other=0.0)
    kept = tl.load(own + sample)
    several = tl.log2(tl.maximum(texts - kept, 1).to(tl.float32))
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, tl.minimum(kept + 1, texts), KEYS):
        columns = first + tl.arange(0, KEYS)
        there = columns < texts
        before = (sample * texts + columns) * (HEADS * HEAD) + start
        keys = tl.load(
            key + before[None, :] + within[:, None], mask=there[None, :] & (within[:, None] < HEAD), other=0.0
        )
        logits = tl.dot(queries, keys) * scale
        weigh = tl.where(columns == kept, several, tl.where(columns < kept, 0.0, float("-inf")))
        logits += tl.where(there, weigh, float("-inf"))[None, :]
        higher = tl.maximum(highest, tl.max(logits, 1))
        shares = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        values = tl.load(
            value + before[:, None] + within[None, :], mask=there[:, None] & (within[None, :] < HEAD), other=0.0
        )
        result = result * shrink[:, None] + tl.dot(shares.to(values.dtype), values)
        highest = higher
    tl.store(output + place, (result / total[:, None]).to(output.dtype.element_ty), mask=inside)
