"""Rotary position embedding in Triton, for CUDA and XPU.

Letters: N tokens, H heads, D features of a head, R rotated pairs (2R <= D).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # whose own types say that a kernel can only be called


def rope(x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Each pair (a, b) of the first 2R features becomes (a * cos - b * sin, b * cos + a * sin); the others pass unchanged.

    The products are float32 and rounded once to the dtype of x.

    Args:
        x_NHD: tokens and heads may lie apart.
        cos_NR, sin_NR: float32.
        interleaved: pairs are (2i, 2i + 1); else (i, i + R), as in Hugging Face's Llama.
        inverse: rotate back: the transpose, and so the gradient.
    Raises: ValueError if more is to be rotated than there is.
    Source: arXiv 2104.09864.
    """
    n_tokens, heads, width = x_NHD.shape
    pairs = cos_NR.shape[-1]
    if 2 * pairs > width:
        raise ValueError(f"{pairs} pairs do not fit into {width} features of a head")
    x = _last_together(x_NHD)
    cos, sin = _last_together(cos_NR), _last_together(sin_NR)
    y = torch.empty((n_tokens, heads, width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block = triton.next_power_of_2(max(pairs, 1))
    block_heads = max(1, min(triton.next_power_of_2(heads), 2048 // block))
    passing = width - 2 * pairs
    _rope[(n_tokens, triton.cdiv(heads, block_heads))](
        x,
        cos,
        sin,
        y,
        heads,
        width,
        pairs,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=block_heads,
        PAIRS=block,
        PASSING=triton.next_power_of_2(passing) if passing else 0,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


def _last_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@jit
def _rope(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    heads: int,
    width: int,
    pairs: int,
    x_token_stride: int,
    x_head_stride: int,
    cos_stride: int,
    sin_stride: int,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PASSING: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)  # token * stride can pass 2^31
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < pairs, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair < pairs, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        first = 2 * pair[None, :]
        second = first + 1
    else:
        first = pair[None, :]
        second = first + pairs
    x_heads = x_ptr + token * x_token_stride + head.to(tl.int64)[:, None] * x_head_stride
    y_heads = y_ptr + token * heads * width + head[:, None] * width
    inside = (head < heads)[:, None] & (pair < pairs)[None, :]
    a = tl.load(x_heads + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_heads + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_heads + first, a * cos - b * sin, mask=inside)
    tl.store(y_heads + second, b * cos + a * sin, mask=inside)
    if PASSING > 0:
        rest = 2 * pairs + tl.arange(0, PASSING)
        rest_inside = (head < heads)[:, None] & (rest < width)[None, :]
        tl.store(y_heads + rest[None, :], tl.load(x_heads + rest[None, :], mask=rest_inside), mask=rest_inside)
