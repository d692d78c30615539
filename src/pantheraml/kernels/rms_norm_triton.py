"""Root-mean-square norm in Triton, for CUDA and XPU.

Letters: N rows, D features, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIAL_SUMS = 256  # rows of the weight's gradient before the last sum: two for each SM of the largest GPUs, 4 MiB at D = 4096

jit: Any = triton.jit  # whose own types say that a kernel can only be called


def rms_norm(x_ND: Tensor, weight_D: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): rstd = (mean(x^2) + eps)^-1/2 in float32 [N], y = x * rstd * (offset + weight) in the dtype of x.

    Everything is float32 until the one rounding of y.

    Args:
        x_ND: any float dtype; rows may lie apart.
        weight_D: any float dtype; None: all zero.
        offset: 0 (Llama) or 1 (Gemma); with no weight, the factor itself.
    Source: arXiv 1910.07467.
    """
    x = _rows(x_ND)
    n_rows, width = x.shape
    y = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rstd
    block, rows, warps = _tile(width)
    _forward[(triton.cdiv(n_rows, rows),)](
        x,
        weight_D,
        y,
        rstd,
        n_rows,
        width,
        x.stride(0),
        eps,
        offset,
        WEIGHT=weight_D is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y, rstd


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor | None, rstd_N: Tensor, offset: float, add_ND: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dw): with h = x * rstd and g = dy * (offset + weight), dx = rstd * (g - h * mean(g * h)) + add and dw = sum of dy * h.

    The sums of dw are made in one fixed order, so that two runs agree to the last bit.

    Args:
        rstd_N: what forward returned.
        add_ND: gradient that reaches x past the norm (the residual's), added before dx is rounded; None: none.
        need_weight: False: dw is empty.
    Returns: dx in the dtype of x; dw float32 [D].
    """
    dy, x = _rows(dy_ND), _rows(x_ND)
    add = None if add_ND is None else _rows(add_ND)
    n_rows, width = x.shape
    dx = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(width if need_weight else 0, dtype=torch.float32, device=x.device)
    block, rows, warps = _tile(width)
    tiles = -(-n_rows // rows)
    programs = min(tiles, PARTIAL_SUMS) if need_weight else tiles
    dw_PD = torch.empty((programs, width) if need_weight else 0, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        dy,
        x,
        weight_D,
        rstd_N,
        add,
        dx,
        dw_PD,
        n_rows,
        width,
        dy.stride(0),
        x.stride(0),
        0 if add is None else add.stride(0),
        offset,
        WEIGHT=weight_D is not None,
        ADD=add is not None,
        NEED_WEIGHT=need_weight,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return dx, dw_PD.sum(0) if need_weight else dw_PD


def _rows(x_ND: Tensor) -> Tensor:
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """Features (all of a row) and rows a program takes, and its warps; short rows (a head's) are taken several at a time."""
    block = int(triton.next_power_of_2(width))
    rows = max(1, 2048 // block)
    return block, rows, max(4, min(16, block * rows // 512))


@jit
def _forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    n_rows: int,
    width: int,
    x_stride: int,
    eps: float,
    offset: float,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]  # rows * stride can pass 2^31
    x = tl.load(x_ptr + wide_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt((x * x).sum(axis=1) / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    factor = tl.full([BLOCK], 0.0, tl.float32) + offset
    if WEIGHT:
        factor += tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * factor[None, :]
    tl.store(y_ptr + wide_rows * width + columns[None, :], y, mask=inside)


@jit
def _backward(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    add_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    n_rows: int,
    width: int,
    dy_stride: int,
    x_stride: int,
    add_stride: int,
    offset: float,
    WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    factor = tl.full([BLOCK], 0.0, tl.float32) + offset
    if WEIGHT:
        factor += tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + wide_rows * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + wide_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        h = x * rstd
        g = dy * factor[None, :]
        dx = rstd * (g - h * ((g * h).sum(axis=1) / width)[:, None])
        if ADD:
            dx += tl.load(add_ptr + wide_rows * add_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide_rows * width + columns[None, :], dx, mask=inside)
        if NEED_WEIGHT:
            dw += (dy * h).sum(axis=0)
    if NEED_WEIGHT:
        tl.store(dw_ptr + program.to(tl.int64) * width + columns, dw, mask=columns < width)
