"""Tokens divided over processes: each has a part of them, and for attention all of them with a part of the heads.

Letters: P processes, N tokens of all of them, n = N / P, H heads, W width of a head. Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.sums import Sums


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """The processes that share the tokens of a micro-batch: the first has the first n of them, and so on.

    Attributes:
        rank: of this process among them, from 0. size: how many there are; it divides tokens and heads.
        group: theirs; all of them call `to_heads` and `to_tokens` in the same order. sums: how they meet.
    """

    rank: int
    size: int
    group: Any
    sums: Sums

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """[N, H / P, W] of each [n, H, W]: of all tokens the heads of this process. They travel together, and lie in one memory."""
        return _Exchanged.apply(self, True, *parts)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[n, H, W] of [N, H / P, W]: of this process's tokens all heads."""
        found: tuple[Tensor, ...] = _Exchanged.apply(self, False, x)
        return found[0]

    def exchanged(self, parts: Sequence[Tensor], to_heads: bool) -> tuple[Tensor, ...]:
        """`to_heads` or `to_tokens` without gradients; each is the backward of the other."""
        heads = [part.shape[1] // self.size if to_heads else part.shape[1] for part in parts]
        given = [part.unflatten(1, (self.size, -1)).transpose(0, 1) if to_heads else part for part in parts]
        came = self.sums.exchanged((given[0] if len(given) == 1 else torch.cat(given, -2)).contiguous(), self.group)
        if to_heads:
            return came.flatten(0, 1).split(heads, 1)
        return tuple(each.transpose(0, 1).flatten(1, 2) for each in came.unflatten(0, (self.size, -1)).split(heads, 2))


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cp: ContextParallel, to_heads: bool, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.cp, ctx.to_heads = cp, to_heads
        return cp.exchanged(parts, to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, None, *ctx.cp.exchanged(grads, not ctx.to_heads)
