"""The gate of an MLP, activation(gate) * up, in Triton, for CUDA and XPU.

Letters: N rows, F intermediate features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024

jit: Any = triton.jit  # whose own types say that a kernel can only be called


def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, float32 until its one rounding to the dtype of gate.

    Args:
        gate_NF, up_NF: rows may lie apart (halves of one product).
        activation: "silu", "gelu_tanh" or "gelu", as torch defines them.
    Raises: ValueError for another activation.
    """
    _check(activation)
    gate, up = _rows(gate_NF), _rows(up_NF)
    a = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if a.numel() == 0:
        return a
    n_rows, width = gate.shape
    _forward[(n_rows, triton.cdiv(width, BLOCK))](
        gate, up, a, width, gate.stride(0), up.stride(0), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return a


def gated_backward(da_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, a): da * up * activation'(gate), da * activation(gate), and activation(gate) * up once more.

    With a made again, nothing but gate and up has to be kept for the gradients of this operation and of the layer after it.

    Raises: ValueError for an activation that `gated` does not know.
    """
    _check(activation)
    da, gate, up = _rows(da_NF), _rows(gate_NF), _rows(up_NF)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    a = torch.empty_like(dgate)
    if a.numel() == 0:
        return dgate, dup, a
    n_rows, width = gate.shape
    _backward[(n_rows, triton.cdiv(width, BLOCK))](
        da,
        gate,
        up,
        dgate,
        dup,
        a,
        width,
        da.stride(0),
        gate.stride(0),
        up.stride(0),
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dgate, dup, a


def _check(activation: str) -> None:
    if activation not in ("silu", "gelu_tanh", "gelu"):
        raise ValueError(f"activation={activation!r} is not one of silu, gelu_tanh, gelu")


def _rows(x_NF: Tensor) -> Tensor:
    return x_NF if x_NF.stride(-1) == 1 else x_NF.contiguous()


@jit
def _activation(x: tl.tensor, ACTIVATION: tl.constexpr) -> Any:
    """The activation of x and its derivative, x float32."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * share, share + x * density
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u): no tanh is needed, and nothing cancels where x is far below 0.
        share = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
        slope = 1.5957691216057308 + 0.21406444881780073 * x * x
        return x * share, share + x * share * (1.0 - share) * slope
    else:
        share = tl.sigmoid(x)
        return x * share, share + x * share * (1.0 - share)


@jit
def _forward(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    a_ptr: tl.tensor,
    width: int,
    gate_stride: int,
    up_stride: int,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2^31
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activation(gate, ACTIVATION)
    tl.store(a_ptr + row * width + columns, activated * up, mask=inside)


@jit
def _backward(
    da_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    dgate_ptr: tl.tensor,
    dup_ptr: tl.tensor,
    a_ptr: tl.tensor,
    width: int,
    da_stride: int,
    gate_stride: int,
    up_stride: int,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    da = tl.load(da_ptr + row * da_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activation(gate, ACTIVATION)
    tl.store(dgate_ptr + row * width + columns, da * up * slope, mask=inside)
    tl.store(dup_ptr + row * width + columns, da * activated, mask=inside)
    tl.store(a_ptr + row * width + columns, activated * up, mask=inside)
