"""Causal attention inside the segments of packed rows on CUDA: torch's flash attention where it can say it, Triton for the rest.

Letters: N tokens, H query heads, K key heads, D features of a head, S segments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pantheraml.kernels import attention_triton


def attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, starts: Tensor, longest: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, lse): out = softmax(z) v and lse = logsumexp(z), z = softcap * tanh(scale * q k / softcap) over the keys a token sees.

    Token i sees j where both are in one segment, j <= i, and i - j < window. 16-bit inputs on an NVIDIA GPU from Ampere on go to
    torch's flash attention if there is no softcap (not run on a GPU yet); its gradients differ in the last bits from run to run
    unless `torch.use_deterministic_algorithms` is on. Everything else goes to `attention_triton`, where arguments and results are
    described.

    Source: arXiv 2307.08691.
    """
    if _flash_can(q_NHD, softcap):
        return _flash(q_NHD, k_NKD, v_NKD, starts, longest, scale, window)
    return attention_triton.attention(q_NHD, k_NKD, v_NKD, starts, longest, scale, window, softcap)


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
    """(dq, dk, dv) of `attention`, from what it was given and what it returned; the weights are computed once more."""
    if _flash_can(q_NHD, softcap):
        return _flash_backward(dout_NHD, q_NHD, k_NKD, v_NKD, out_NHD, lse_HN, starts, longest, scale, window)
    return attention_triton.attention_backward(dout_NHD, q_NHD, k_NKD, v_NKD, out_NHD, lse_HN, starts, longest, scale, window, softcap)


def _flash_can(q_NHD: Tensor, softcap: float) -> bool:
    """Whether torch's flash attention computes this; what forward and backward are asked must get one answer."""
    if not q_NHD.is_cuda or q_NHD.dtype not in (torch.float16, torch.bfloat16) or softcap != 0.0:
        return False
    width = q_NHD.shape[-1]
    # Between 192 and 256 some of its kernels need more shared memory than a consumer's GPU has.
    if q_NHD.shape[0] == 0 or width % 8 != 0 or not (width <= 192 or width == 256):
        return False
    target: Any = triton.runtime.driver.active.get_current_target()
    return isinstance(target.arch, int) and target.arch >= 80  # AMD's are names


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int) -> tuple[Tensor, Tensor]:
    # The operator below torch.nn.attention.varlen: that one has an autograd of its own, and a name that torch 2.9 does not know.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _together(q),
        _together(k),
        _together(v),
        starts,
        starts,
        longest,
        longest,
        0.0,  # dropout
        window == 0,  # causal; with a window, its right side says so
        False,  # no debug mask
        scale=scale,
        window_size_left=window - 1 if window else -1,  # it counts the keys before a token, we the token too
        window_size_right=0,
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout there are no random numbers to draw again; the operator wants their state all the same.
    no_random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        _together(dout),
        _together(q),
        _together(k),
        _together(v),
        out,
        lse,
        starts,
        starts,
        longest,
        longest,
        0.0,
        window == 0,
        no_random,
        torch.empty(0, device=q.device),
        scale=scale,
        window_size_left=window - 1 if window else -1,
        window_size_right=0,
    )
    return dq, dk, dv


def _together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
