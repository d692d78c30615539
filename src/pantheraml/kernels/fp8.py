"""A frozen matrix in eight-bit floats (e4m3), and products with rows that are rounded to eight bits on the way.

Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.table import FP8_ROUNDING, load

E4M3 = torch.float8_e4m3fn
_MOST = torch.finfo(E4M3).max
_MULTIPLE = 16
"""Inputs and outputs come in multiples of so many in the product of a GPU."""


class Fp8:
    """A `Base` (linear.py): one scale for each output, and once more turned, one for each input; one for each row that comes.

    Forward and the gradient of the input are both in eight bits with sums in float32. Gradients are e4m3 too: with a scale
    for each row its three bits behind the point are worth more than the range of e5m2. The matrix takes 2 bytes a weight.

    Args:
        weight_OI: any float dtype, on the device where it stays; both sizes multiples of 16.
    Raises: ValueError for other sizes.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        if why := unfit(weight_OI):
            raise ValueError(why)
        self._rounded: Callable[[Tensor], tuple[Tensor, Tensor]] = load(FP8_ROUNDING.get(weight_OI.device.type, FP8_ROUNDING["others"]))
        self._forward: tuple[Tensor, Tensor] = self._rounded(weight_OI)
        self._backward: tuple[Tensor, Tensor] = self._rounded(self.dense().T)

    def prepare(self, x_NI: Tensor) -> Any:
        """See `Base.prepare`: the rows in eight bits, their scales, and the dtype to come back to."""
        return *self._rounded(x_NI), x_NI.dtype

    def forward(self, prepared: Any, add_NO: Tensor | None = None) -> Tensor:
        """See `Base.forward`."""
        rows, scale, dtype = prepared
        y = _product(rows, scale, dtype, *self._forward)
        return y if add_NO is None else y.add_(add_NO)

    def backward(self, grad_NO: Tensor, add_NI: Tensor | None = None) -> Tensor:
        """See `Base.backward`."""
        y = _product(*self._rounded(grad_NO), grad_NO.dtype, *self._backward)
        return y if add_NI is None else y.add_(add_NI)

    def dense(self) -> Tensor:
        """The matrix that forward multiplies by, float32 [O, I]."""
        q, scale = self._forward
        return q.float() * scale

    def __deepcopy__(self, memo: Any) -> Fp8:
        """Itself: nothing changes it."""
        return self


def unfit(weight_OI: Tensor) -> str | None:
    """Why a matrix cannot be held so; None: it can."""
    odd = any(size % _MULTIPLE for size in weight_OI.shape)
    return f"a matrix of {tuple(weight_OI.shape)} has a side that is no multiple of {_MULTIPLE}" if odd else None


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): e4m3 [N, I] and float32 [N, 1], the largest of each row being the largest that e4m3 has."""
    wide = x_NI.float()
    scale_N1 = wide.abs().amax(1, keepdim=True).clamp_min(1e-20) / _MOST
    return (wide / scale_N1).to(E4M3).contiguous(), scale_N1


def _product(rows_NI: Tensor, scale_N1: Tensor, dtype: torch.dtype, q_OI: Tensor, scale_O1: Tensor) -> Tensor:
    if not len(rows_NI):  # torch 2.13 would not take their scales
        return rows_NI.new_empty(0, len(q_OI), dtype=dtype)
    # bfloat16 is the only result that every GPU has with a scale a row; what it rounds is a tenth of what eight bits did.
    scales: Any = {"scale_a": scale_N1, "scale_b": scale_O1.T.contiguous()}
    y = torch._scaled_mm(rows_NI, q_OI.T, **scales, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
    return y.to(dtype)
