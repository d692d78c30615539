"""A frozen linear layer with a low-rank addition, as one operation that keeps only what its gradients need.

Letters: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """x @ weight.T + bias + scale * (x @ a.T) @ b.T, in the dtype of autocast, or else of x.

    Kept for backward are x in that dtype (which the layers that share an input share) and the [N, R] product x @ a.T;
    PEFT's layer keeps a float32 copy of x and a cast of it besides. No gradient is computed for weight and bias.

    Args:
        x_NI: any float dtype, any leading dimensions.
        weight_OI, bias_O: frozen. a_RI, b_OR: trained, usually float32; their gradients have their dtype.
    Raises: ValueError if weight or bias requires a gradient: it would silently get none.
    Source: the formula of LoRA (arXiv 2106.09685); the order of its products is PEFT's.
    """
    if weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        raise ValueError("weight and bias must be frozen: this operation gives them no gradient")
    device = x_NI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NI.dtype
    rows = x_NI.reshape(-1, x_NI.shape[-1]).to(dtype)
    result: Tensor = _LoraLinear.apply(rows, weight_OI, bias_O, a_RI, b_OR, scale)
    return result.view(*x_NI.shape[:-1], weight_OI.shape[0])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        dtype = x_NI.dtype
        # In `dtype` by hand: autocast would cast the factors once more, and remember the casts.
        with torch.autocast(x_NI.device.type, enabled=False):
            low_NR = x_NI @ a_RI.to(dtype).T
            y_NO = F.linear(x_NI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
            y_NO.addmm_(low_NR, b_OR.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.scale = scale
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_NO,) = grads
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        dtype = x_NI.dtype
        with torch.autocast(x_NI.device.type, enabled=False):
            grad_low_NR = (grad_NO @ b_OR.to(dtype)).mul_(ctx.scale) if need_x or need_a else None
            grad_b = (grad_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale) if need_b else None
            grad_a = grad_x = None
            if grad_low_NR is not None and need_a:
                grad_a = (grad_low_NR.T @ x_NI).to(a_RI.dtype)
            if grad_low_NR is not None and need_x:
                grad_x = grad_NO @ weight_OI.to(dtype)
                grad_x.addmm_(grad_low_NR, a_RI.to(dtype))
        return grad_x, None, None, grad_a, grad_b, None
