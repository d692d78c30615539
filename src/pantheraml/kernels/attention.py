"""Causal attention over tokens that belong to several examples, each seeing only its own.

Letters: N tokens of all examples, S examples, H query heads, K key heads (H / K queries share one), D width of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.operations import ops, wide


def attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    starts_S: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(mask(cap(scale * q @ k.T))) @ v for each example, [N, H, D].

    Keeps q, k, v, the result and one float32 a head and token for backward; scores are never all in memory.

    Args:
        starts_S: int32 [S + 1], where each example begins among the N tokens; the last is N.
        longest: tokens of the longest example.
        window: a token sees only the last so many, itself included. softcap: scores become softcap * tanh(score / softcap).
    Source: arXiv 2205.14135 (blocks with a running softmax), 2305.13245 (shared keys).
    """
    result: Tensor = _Attention.apply(q_NHD, k_NKD, v_NKD, starts_S, longest, scale, window or 0, softcap or 0.0)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int, softcap: float
    ) -> Tensor:
        out, lse = ops.attention(q, k, v, starts, longest, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.how = (longest, scale, window, softcap)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *ops.attention_backward(grads[0], *ctx.saved_tensors, *ctx.how), None, None, None, None, None


def reference(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, starts_S: Tensor, longest: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse is float32 [H, N], the logarithm of the sum of a token's weights before they are divided by it."""
    dtype = wide(q_NHD)
    out, lse = torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=dtype)
    for start, end in _examples(starts_S):
        q, k, v = _heads(q_NHD, k_NKD, v_NKD, start, end)
        scores_HTT = _scores(q, k, scale, window, softcap).to(dtype)
        lse[:, start:end] = torch.logsumexp(scores_HTT, -1)
        weights = torch.exp(scores_HTT - lse[:, start:end, None]).to(q.dtype)
        out[start:end] = (weights @ v).transpose(0, 1)
    return out, lse


def reference_backward(
    dout_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    out_NHD: Tensor,
    lse_HN: Tensor,
    starts_S: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), from the weights computed once more."""
    dtype, groups = wide(q_NHD), q_NHD.shape[1] // k_NKD.shape[1]
    dq, dk, dv = torch.empty_like(q_NHD), torch.empty_like(k_NKD), torch.empty_like(v_NKD)
    for start, end in _examples(starts_S):
        q, k, v = _heads(q_NHD, k_NKD, v_NKD, start, end)
        dout = dout_NHD[start:end].transpose(0, 1)
        scores = _scores(q, k, scale, window, softcap).to(dtype)
        weights = torch.exp(scores - lse_HN[:, start:end, None])
        dweights = (dout @ v.transpose(1, 2)).to(dtype)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        if softcap:
            dscores = dscores * (1 - (scores.clamp_min(-softcap) / softcap).square())
        dscores = (dscores * scale).to(q.dtype)
        dq[start:end] = (dscores @ k).transpose(0, 1)
        for shared, each in ((dk, dscores.transpose(1, 2) @ q), (dv, weights.to(q.dtype).transpose(1, 2) @ dout)):
            shared[start:end] = each.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk, dv


def _examples(starts_S: Tensor) -> list[tuple[int, int]]:
    starts = starts_S.tolist()
    return [(start, end) for start, end in pairwise(starts) if end > start]


def _heads(q: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of one example, [H, T, D] each."""
    groups = q.shape[1] // k.shape[1]
    spread = [each[start:end].transpose(0, 1).repeat_interleave(groups, 0) for each in (k, v)]
    return q[start:end].transpose(0, 1), spread[0], spread[1]


def _scores(q_HTD: Tensor, k_HTD: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    scores = (q_HTD @ k_HTD.transpose(1, 2)).to(wide(q_HTD)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    t = torch.arange(q_HTD.shape[1], device=q_HTD.device)
    behind = t[:, None] - t[None, :]
    hidden = behind < 0 if not window else (behind < 0) | (behind >= window)
    return scores.masked_fill(hidden, float("-inf"))


def shapes(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, starts_S: Tensor, longest: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Empty tensors like those of `reference`, which looks at the values of `starts`."""
    return torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=wide(q_NHD))


def shapes_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like those of `reference_backward`."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
