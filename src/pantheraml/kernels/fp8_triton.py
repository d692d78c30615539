"""Rows rounded to eight-bit floats (e4m3) in Triton, for NVIDIA GPUs. Letters: N rows, I numbers of a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # whose own types say that a kernel can only be called
BLOCK = 4096


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) as fp8.py's `rounded` gives them, in one kernel that reads a row twice. x: any float dtype, any strides. Not run on a GPU yet."""
    rows, width = x_NI.shape
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_NI.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x_NI.device)
    if rows:
        _rounded[(rows,)](
            x_NI,
            q,
            scale,
            width,
            x_NI.stride(0),
            x_NI.stride(1),
            MOST=torch.finfo(q.dtype).max,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            num_warps=8,
            enable_fp_fusion=True,
        )
    return q, scale


@jit
def _rounded(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    width: int,
    row_stride: int,
    stride: int,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    largest = tl.full([], 1e-20, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + block
        x = tl.load(x_ptr + row * row_stride + columns * stride, mask=columns < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x).max(axis=0))
    scale = largest / MOST
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, BLOCK):
        columns = start + block
        x = tl.load(x_ptr + row * row_stride + columns * stride, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(q_ptr + row * width + columns, (x / scale).to(tl.float8e4nv), mask=columns < width)
