"""A frozen matrix in four bits (NF4) as bitsandbytes holds it: made whole once for each use, or once for all."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Nf4:
    """A `Base` (linear.py) over a Params4bit of bitsandbytes.

    Args:
        weight: that, or any tensor of the same bytes. state: how they are read, which a Params4bit says itself.
        keep: what was made whole is kept, in the dtype of the rows that it is multiplied with.
    Source: arXiv 2305.14314; the format and its reading are bitsandbytes'.
    """

    def __init__(self, weight: Any, state: Any = None, *, keep: bool = False) -> None:
        self._weight, self._state, self._keep = weight, state or weight.quant_state, keep
        self._whole: Tensor | None = None

    def prepare(self, x_NI: Tensor) -> Tensor:
        """See `Base.prepare`."""
        return x_NI

    def forward(self, prepared: Tensor, add_NO: Tensor | None = None) -> Tensor:
        """See `Base.forward`."""
        matrix = self._matrix(prepared.dtype)
        return F.linear(prepared, matrix) if add_NO is None else torch.addmm(add_NO, prepared, matrix.T)

    def backward(self, grad_NO: Tensor, add_NI: Tensor | None = None) -> Tensor:
        """See `Base.backward`."""
        matrix = self._matrix(grad_NO.dtype)
        return grad_NO @ matrix if add_NI is None else torch.addmm(add_NI, grad_NO, matrix)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        if self._whole is not None and self._whole.dtype == dtype:
            return self._whole
        matrix = self.dense().to(dtype)
        self._whole = matrix if self._keep else None
        return matrix

    @torch.no_grad()
    def dense(self) -> Tensor:
        """[O, I], in the dtype that the weights had."""
        from bitsandbytes.functional import dequantize_4bit

        # As one long row: blocks of 64 were taken along it, but a CPU would read them as if each row of the matrix began anew
        # (bitsandbytes 0.50), which is another matrix where I is no multiple of 64.
        state = copy(self._state)
        shape, state.shape = state.shape, torch.Size((state.shape.numel(),))
        return dequantize_4bit(self._weight.data, state).view(shape)
