"""Rotary position embedding. Letters: N tokens, H heads, D width of a head, R pairs that are rotated (2R <= D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.operations import ops, wide


def rope(x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, *, interleaved: bool = False) -> Tensor:
    """The first 2R values of each head rotated by the angles of its token, the others as they are.

    Args:
        cos_NR, sin_NR: float32, from the model's own embedding of positions, with whatever scaling its type has.
        interleaved: pairs are (2i, 2i + 1), as in Cohere, instead of (i, i + R).
    Source: arXiv 2104.09864. Backward is the transposed rotation and keeps only the angles.
    """
    result: Tensor = _Rope.apply(x_NHD, cos_NR, sin_NR, interleaved)
    return result


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_NR, sin_NR)
        ctx.interleaved = interleaved
        return ops.rope(x_NHD, cos_NR, sin_NR, interleaved, False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ops.rope(grads[0], *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def reference(x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin); inverse: with -sin."""
    pairs = cos_NR.shape[1]
    x = x_NHD.to(wide(x_NHD))
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    cos, sin = cos_NR[:, None].to(x.dtype), (-sin_NR if inverse else sin_NR)[:, None].to(x.dtype)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, rest), -1).to(x_NHD.dtype)
