"""Root mean square norm: each row is divided by its root mean square and scaled.

Letters: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.operations import ops, wide


def rms_norm(x_ND: Tensor, weight_D: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), computed in float32 and rounded once.

    Keeps x and one float32 a row for backward.

    Args:
        x_ND: any float dtype; any number of rows. weight_D: of any float dtype; a gradient is computed where it is required.
        offset: 1.0 in Gemma, whose weights are stored as differences from one.
    Source: arXiv 1910.07467.
    """
    result: Tensor = _RmsNorm.apply(x_ND, weight_D, eps, offset)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor:
        y_ND, rstd_N = ops.rms_norm(x_ND, weight_D, eps, offset)
        ctx.save_for_backward(x_ND, weight_D, rstd_N)
        ctx.offset = offset
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, rstd_N = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = ops.rms_norm_backward(grads[0], x_ND, weight_D, rstd_N, ctx.offset, None, need_weight)
        return grad_x, grad_weight.to(weight_D.dtype) if need_weight else None, None, None


def reference(x_ND: Tensor, weight_D: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): rstd is float32 [N], 1 / sqrt(mean(x^2) + eps)."""
    x = x_ND.to(wide(x_ND))
    rstd_N = torch.rsqrt(x.square().mean(-1) + eps)
    y = x * rstd_N[:, None]
    if weight_D is not None:
        y = y * (weight_D.to(y.dtype) + offset)
    return y.to(x_ND.dtype), rstd_N


def reference_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor | None, rstd_N: Tensor, offset: float, add_ND: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight): `add` is a gradient that x has from elsewhere; dweight is float32, empty where nobody needs it.

    With n = x * rstd and g = dy * (offset + weight): dx = add + rstd * (g - n * mean(g * n)), dweight = sum over rows of dy * n.
    """
    dtype = wide(x_ND)
    dy, n = dy_ND.to(dtype), x_ND.to(dtype) * rstd_N[:, None]
    g = dy if weight_D is None else dy * (weight_D.to(dtype) + offset)
    dx = rstd_N[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
    if add_ND is not None:
        dx = dx + add_ND.to(dtype)
    return dx.to(x_ND.dtype), (dy * n).sum(0) if need_weight else x_ND.new_empty(0, dtype=dtype)
