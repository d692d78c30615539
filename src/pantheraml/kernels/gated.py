"""The gate of an MLP: act(gate) * up. Letters: N rows, F width."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pantheraml.kernels.operations import ops, wide

Activation = Literal["silu", "gelu_tanh", "gelu"]


def gated(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up in float32, rounded once (SwiGLU, GeGLU); keeps gate and up, not what is between. Source: arXiv 2002.05202."""
    result: Tensor = _Gated.apply(gate_NF, up_NF, activation)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation = activation
        return ops.gated(gate_NF, up_NF, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_gate, grad_up, _ = ops.gated_backward(grads[0], *ctx.saved_tensors, ctx.activation)
        return grad_gate, grad_up, None


def reference(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    return (_act(gate_NF.to(wide(gate_NF)), activation) * up_NF.to(wide(gate_NF))).to(gate_NF.dtype)


def reference_backward(da_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, act(gate) * up): the last is what the next layer's adapter needs, and would be computed again anyway."""
    dtype, out = wide(gate_NF), gate_NF.dtype
    da, gate, up = da_NF.to(dtype), gate_NF.to(dtype), up_NF.to(dtype)
    act, slope = _act(gate, activation), _slope(gate, activation)
    return (da * up * slope).to(out), (da * act).to(out), (act * up).to(out)


def _act(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of the activation."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
