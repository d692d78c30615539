"""Cross entropy of logits that are there, and their gradient in their own place, in Triton, for CUDA and XPU.

Letters: C tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # whose own types say that a kernel can only be called


def cross_entropy(logits_CV: Tensor, labels_C: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor:
    """logsumexp(z) - z[label] of each token, z = softcap * tanh(scale * logits / softcap), in two walks over the logits.

    The first walk keeps the largest z and a sum that is rescaled when a larger one comes; the second writes the gradient.

    Args:
        logits_CV: float32, bfloat16 or float16, contiguous. With `gradient`, OVERWRITTEN by d loss / d logits.
        labels_C: int64; -100: loss and gradient are 0, whatever the logits. Another label outside of V: the loss is nan.
        softcap: 0.0: z = scale * logits.
    Returns: float32 [C].
    Raises: ValueError if the logits are not contiguous: the gradient would land in a copy.
    Source: the running sum is that of arXiv 1805.02867.
    """
    if not logits_CV.is_contiguous():
        raise ValueError("logits must be contiguous")
    tokens, vocabulary = logits_CV.shape
    loss = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    if tokens == 0:
        return loss
    _cross_entropy[(tokens,)](
        logits_CV,
        labels_C.contiguous(),
        loss,
        vocabulary,
        scale,
        softcap,
        SOFTCAP=softcap != 0.0,
        GRADIENT=gradient,
        BLOCK=min(4096, triton.next_power_of_2(vocabulary)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return loss


@jit
def bounded(x: tl.tensor, cap: float) -> Any:
    """cap * tanh(x / cap), for kernels; x float32.

    Triton has no tanh on every device. With e = exp(-2|u|): tanh(|u|) = (1 - e) / (1 + e), whose 1 - e loses digits near 0, so that
    small u take the series.
    """
    u = x / cap
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    square = u * u
    # To u^9; at |u| = 1/4 the next term is 2^-27 of the sum.
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    return cap * tl.where(square < 0.0625, u * series, tl.where(u < 0.0, -far, far))


@jit
def slope_of_bounded(x: tl.tensor, cap: float) -> Any:
    """The derivative 1 - tanh(x / cap)^2 = 4e / (1 + e)^2, e = exp(-2|x / cap|), in which nothing cancels; x float32."""
    e = tl.exp(-2.0 * tl.abs(x / cap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@jit
def _cross_entropy(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    vocabulary: int,
    scale: float,
    softcap: float,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)  # token * vocabulary can pass 2^31
    label = tl.load(labels_ptr + token)
    row_ptr = logits_ptr + token * vocabulary
    block = tl.arange(0, BLOCK)
    if label == -100:
        tl.store(loss_ptr + token, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + block
                tl.store(row_ptr + columns, tl.zeros([BLOCK], tl.float32), mask=columns < vocabulary)
    else:
        known = (label >= 0) & (label < vocabulary)
        # Read before the second walk overwrites it.
        z_label = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale
        if SOFTCAP:
            z_label = bounded(z_label, softcap)
        # Not -inf: the difference of two -inf, in a block of them, would be nan.
        highest = tl.full([], -1.0e38, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + block
            z = tl.load(row_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32) * scale
            if SOFTCAP:
                z = bounded(z, softcap)
            z = tl.where(columns < vocabulary, z, -float("inf"))
            higher = tl.maximum(highest, z.max(axis=0))
            total = total * tl.exp(highest - higher) + tl.exp(z - higher).sum(axis=0)
            highest = higher
        lse = highest + tl.log(total)
        tl.store(loss_ptr + token, lse - z_label)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + block
                z = tl.load(row_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32) * scale
                slope = tl.full([BLOCK], 1.0, tl.float32)
                if SOFTCAP:
                    slope = slope_of_bounded(z, softcap)
                    z = bounded(z, softcap)
                dz = tl.exp(z - lse) - tl.where(columns == label, 1.0, 0.0)
                tl.store(row_ptr + columns, dz * slope * scale, mask=columns < vocabulary)
