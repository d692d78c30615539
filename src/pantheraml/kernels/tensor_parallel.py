"""Products divided over processes: each has some of the outputs of a first matrix, and as many of the inputs of a second one.

Between the two nothing travels. Source: Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pantheraml.kernels.linear import Projection
from pantheraml.kernels.sums import Sums

Side = Literal["outputs", "inputs"]


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The processes that share the products of a model.

    Attributes:
        rank: of this process among them, from 0. size: how many there are.
        group: theirs; all of them call `begun` and `summed` in the same order. sums: how they meet.
    """

    rank: int
    size: int
    group: Any
    sums: Sums

    def begun(self, x: Tensor) -> Tensor:
        """x, in front of matrices divided by outputs: each process has a part of its gradient, and gets the sum."""
        found: Tensor = _Begun.apply(x, self)
        return found

    def summed(self, x: Tensor) -> Tensor:
        """The sum of what the processes have behind a matrix divided by inputs."""
        found: Tensor = _Summed.apply(x, self)
        return found

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor along a dimension, which must divide by `size`; a view."""
        each, left = divmod(tensor.shape[dim], self.size)
        if left:
            raise ValueError(f"dimension {dim} of {tuple(tensor.shape)} does not divide into {self.size} parts")
        return tensor.narrow(dim, self.rank * each, each)

    def all_reduced(self, x: Tensor) -> Tensor:
        """A new tensor with the sum."""
        return self.sums.over(x.clone(memory_format=torch.contiguous_format), self.group)

    def projection(self, whole: Projection, side: Side) -> Projection:
        """A layer whose matrix is this process's part already, with its part of the adapter, which every process has as a whole.

        Where inputs are divided, the bias is left out: it belongs behind the sum.
        """
        a, b = whole.a_RI, whole.b_OR
        if side == "outputs":
            return replace(whole, b_OR=None if b is None else self.part(b, 0))
        return replace(whole, bias_O=None, a_RI=None if a is None else self.part(a, 1))


class _Begun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return ctx.tp.all_reduced(grads[0]), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return tp.all_reduced(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return grads[0], None
