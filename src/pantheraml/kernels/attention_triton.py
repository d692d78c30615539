"""Causal attention inside the segments of packed rows in Triton, for CUDA and XPU.

A block of query rows need not begin where a segment does: it walks from the first key that any of its rows sees to its last row, so
that the work is the same however many segments there are. Letters: N tokens, H query heads, K key heads, D features of a head,
S segments. Each K serves H / K neighbouring H.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pantheraml.kernels.cross_entropy_triton import bounded, slope_of_bounded

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

jit: Any = triton.jit  # whose own types say that a kernel can only be called


def attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, starts: Tensor, longest: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, lse): out = softmax(z) v and lse = logsumexp(z), z = softcap * tanh(scale * q k / softcap) over the keys a token sees.

    Token i sees j where both are in one segment, j <= i, and i - j < window. Sums are float32; the weights are rounded to the dtype
    of v before they meet it. Two runs agree to the last bit. Not run on a GPU yet.

    Args:
        q_NHD, k_NKD, v_NKD: one float dtype; tokens and heads may lie apart.
        starts: int32 [S + 1] on the device, 0 ... N; a segment may be empty.
        longest: not needed here; other implementations do.
        window: 0: all of a segment.
        softcap: 0.0: z = scale * q k.
    Returns: out [N, H, D] in the dtype of q; lse float32 [H, N].
    Source: arXiv 2205.14135, 2307.08691; the bound of z is Gemma 2's (arXiv 2408.00118).
    """
    q, k, v = _together(q_NHD), _together(k_NKD), _together(v_NKD)
    tokens, heads, width = q.shape
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    block_width, rows, columns, warps, stages = _blocks(width, q.element_size(), forward=True)
    _forward[(triton.cdiv(tokens, rows), heads)](
        q,
        k,
        v,
        out,
        lse,
        starts.contiguous(),
        tokens,
        starts.numel() - 1,
        heads // k.shape[1],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        scale,
        window,
        softcap,
        SOFTCAP=softcap != 0.0,
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    return out, lse


def attention_backward(
    dout_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    out_NHD: Tensor,
    lse_HN: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention`, from what it was given and what it returned; the weights are computed once more.

    No two programs add to one place, so that two runs agree to the last bit.
    """
    dout, q, k, v, out, lse = (_together(each) for each in (dout_NHD, q_NHD, k_NKD, v_NKD, out_NHD, lse_HN))
    tokens, heads, width = q.shape
    key_heads = k.shape[1]
    dq = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    dk = torch.empty((tokens, key_heads, width), dtype=k.dtype, device=q.device)
    dv = torch.empty((tokens, key_heads, width), dtype=v.dtype, device=q.device)
    if tokens == 0:
        return dq, dk, dv
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    block_width, rows, columns, warps, stages = _blocks(width, q.element_size(), forward=False)
    options = {
        "SOFTCAP": softcap != 0.0,
        "WIDTH": width,
        "BLOCK_WIDTH": block_width,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    numbers = (tokens, starts.numel() - 1, heads // key_heads)
    strides = (*dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    # First dq: it also leaves delta for the other.
    _backward_q[(triton.cdiv(tokens, rows), heads)](
        dout,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        starts.contiguous(),
        *numbers,
        *strides,
        *out.stride()[:2],
        scale,
        window,
        softcap,
        **options,
    )
    _backward_kv[(triton.cdiv(tokens, columns), key_heads)](
        dout, q, k, v, lse, delta, dk, dv, starts.contiguous(), *numbers, *strides, scale, window, softcap, **options
    )
    return dq, dk, dv


def _together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(width: int, element_bytes: int, forward: bool) -> tuple[int, int, int, int, int]:
    """Features, query rows and keys of a block, warps and stages.

    What needs at most 99 KiB of shared memory, the least of Ampere and later, and of what the compiler then reports what keeps
    (nearly) everything in registers. Not timed on a GPU yet.
    """
    block_width = max(16, int(triton.next_power_of_2(width)))  # a matrix unit takes no less than 16
    if element_bytes == 4:  # outside the matrix units, which would round to fewer bits
        side = 32 if block_width <= 64 else 16
        return block_width, side, side, 8, 1
    if block_width <= 64:
        return block_width, 128 if forward else 64, 64, 8 if forward else 4, 2
    if block_width <= 128:
        return block_width, 64, 64 if forward else 32, 4, 2
    if block_width <= 256:
        return block_width, 64 if forward else 32, 32, 8 if forward else 4, 1
    return block_width, 16, 16, 4, 1


@jit
def _segment(tokens: tl.tensor, starts_ptr: tl.tensor, segments: int) -> Any:
    """First token of each token's segment, and one past its last, by bisection: starts[left] <= token < starts[right]."""
    left = tokens * 0
    right = left + segments
    width = segments
    while width > 1:
        middle = (left + right) // 2
        before = tl.load(starts_ptr + middle) <= tokens
        left = tl.where(before, middle, left)
        right = tl.where(before, right, middle)
        width = (width + 1) // 2
    return tl.load(starts_ptr + left), tl.load(starts_ptr + left + 1)


@jit
def _forward(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    n_tokens: int,
    segments: int,
    group: int,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    scale: float,
    window: int,
    softcap: float,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest work first: late tokens have the most keys
    head = tl.program_id(1).to(tl.int64)  # a product with a stride can pass 2^31
    rows = block * ROWS + tl.arange(0, ROWS)
    real = rows < n_tokens
    rows = tl.minimum(rows, n_tokens - 1)
    features = tl.arange(0, BLOCK_WIDTH)
    lowest, _ = _segment(rows, starts_ptr, segments)
    if window > 0:
        lowest = tl.maximum(lowest, rows - window + 1)
    q = tl.load(
        q_ptr + head * q_head + rows.to(tl.int64)[:, None] * q_token + features[None, :], mask=(features < WIDTH)[None, :], other=0.0
    )
    # Not -inf: in a row that has seen no key yet, the difference of two -inf would be nan.
    highest = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_v = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(lowest.min(axis=0) // COLUMNS * COLUMNS, tl.minimum(n_tokens, block * ROWS + ROWS), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < n_tokens)[:, None] & (features < WIDTH)[None, :]
        wide_columns = columns.to(tl.int64)[:, None]
        k = tl.load(k_ptr + head // group * k_head + wide_columns * k_token + features[None, :], mask=inside, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            z = bounded(z, softcap)
        z = tl.where((columns[None, :] >= lowest[:, None]) & (columns[None, :] <= rows[:, None]), z, -float("inf"))
        higher = tl.maximum(highest, z.max(axis=1))
        p = tl.exp2((z - higher[:, None]) * LOG2_E)
        shrink = tl.exp2((highest - higher) * LOG2_E)
        total = total * shrink + p.sum(axis=1)
        v = tl.load(v_ptr + head // group * v_head + wide_columns * v_token + features[None, :], mask=inside, other=0.0)
        sum_v = sum_v * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    heads = tl.num_programs(1)
    tl.store(
        out_ptr + (rows.to(tl.int64) * heads + head)[:, None] * WIDTH + features[None, :],
        sum_v / total[:, None],
        mask=real[:, None] & (features < WIDTH)[None, :],
    )
    tl.store(lse_ptr + head * n_tokens + rows, highest + tl.log(total), mask=real)


@jit
def _backward_q(
    dout_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    n_tokens: int,
    segments: int,
    group: int,
    dout_token: int,
    dout_head: int,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    out_token: int,
    out_head: int,
    scale: float,
    window: int,
    softcap: float,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dq = sum over keys of dz * k * scale, dz = p * (dout v - delta) * slope, delta = dout out; p comes back from z and lse."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    real = rows < n_tokens
    rows = tl.minimum(rows, n_tokens - 1)
    wide_rows = rows.to(tl.int64)[:, None]
    features = tl.arange(0, BLOCK_WIDTH)
    known = (features < WIDTH)[None, :]
    lowest, _ = _segment(rows, starts_ptr, segments)
    if window > 0:
        lowest = tl.maximum(lowest, rows - window + 1)
    q = tl.load(q_ptr + head * q_head + wide_rows * q_token + features[None, :], mask=known, other=0.0)
    dout = tl.load(dout_ptr + head * dout_head + wide_rows * dout_token + features[None, :], mask=known, other=0.0)
    out = tl.load(out_ptr + head * out_head + wide_rows * out_token + features[None, :], mask=known, other=0.0)
    delta = (dout.to(tl.float32) * out.to(tl.float32)).sum(axis=1)
    tl.store(delta_ptr + head * n_tokens + rows, delta, mask=real)
    lse = tl.load(lse_ptr + head * n_tokens + rows)
    dq = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(lowest.min(axis=0) // COLUMNS * COLUMNS, tl.minimum(n_tokens, block * ROWS + ROWS), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < n_tokens)[:, None] & known
        wide_columns = columns.to(tl.int64)[:, None]
        k = tl.load(k_ptr + head // group * k_head + wide_columns * k_token + features[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + head // group * v_head + wide_columns * v_token + features[None, :], mask=inside, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        slope = 1.0
        if SOFTCAP:
            slope = slope_of_bounded(z, softcap)
            z = bounded(z, softcap)
        seen = (columns[None, :] >= lowest[:, None]) & (columns[None, :] <= rows[:, None])
        p = tl.where(seen, tl.exp2((z - lse[:, None]) * LOG2_E), 0.0)
        dz = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None]) * slope
        dq += tl.dot(dz.to(k.dtype), k, input_precision="ieee")
    heads = tl.num_programs(1)
    tl.store(
        dq_ptr + (wide_rows * heads + head) * WIDTH + features[None, :],
        dq * scale,
        mask=real[:, None] & known,
    )


@jit
def _backward_kv(
    dout_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    n_tokens: int,
    segments: int,
    group: int,
    dout_token: int,
    dout_head: int,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    scale: float,
    window: int,
    softcap: float,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dv = sum over queries of p * dout and dk = sum of dz * q * scale, by one program for all heads that share the keys."""
    block = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < n_tokens
    columns = tl.minimum(columns, n_tokens - 1)
    wide_columns = columns.to(tl.int64)[:, None]
    features = tl.arange(0, BLOCK_WIDTH)
    known = (features < WIDTH)[None, :]
    _, end = _segment(columns, starts_ptr, segments)
    if window > 0:
        end = tl.minimum(end, columns + window)
    k = tl.load(k_ptr + key_head * k_head + wide_columns * k_token + features[None, :], mask=known, other=0.0)
    v = tl.load(v_ptr + key_head * v_head + wide_columns * v_token + features[None, :], mask=known, other=0.0)
    dk = tl.zeros([COLUMNS, BLOCK_WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_WIDTH], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        for start in range(block * COLUMNS // ROWS * ROWS, end.max(axis=0), ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = (rows < n_tokens)[:, None] & known
            wide_rows = rows.to(tl.int64)[:, None]
            q = tl.load(q_ptr + head * q_head + wide_rows * q_token + features[None, :], mask=inside, other=0.0)
            dout = tl.load(dout_ptr + head * dout_head + wide_rows * dout_token + features[None, :], mask=inside, other=0.0)
            lse = tl.load(lse_ptr + head * n_tokens + rows, mask=rows < n_tokens, other=0.0)
            delta = tl.load(delta_ptr + head * n_tokens + rows, mask=rows < n_tokens, other=0.0)
            z = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            slope = 1.0
            if SOFTCAP:
                slope = slope_of_bounded(z, softcap)
                z = bounded(z, softcap)
            seen = (rows[None, :] >= columns[:, None]) & (rows[None, :] < end[:, None])
            p = tl.where(seen, tl.exp2((z - lse[None, :]) * LOG2_E), 0.0)
            dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
            dz = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * slope
            dk += tl.dot(dz.to(q.dtype), q, input_precision="ieee")
    key_heads = tl.num_programs(1)
    place = (wide_columns * key_heads + key_head) * WIDTH + features[None, :]
    tl.store(dk_ptr + place, dk * scale, mask=real[:, None] & known)
    tl.store(dv_ptr + place, dv, mask=real[:, None] & known)
