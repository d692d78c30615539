"""A frozen matrix in eight-bit whole numbers, and products with rows that are rounded to eight bits on the way.

Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pantheraml.kernels.table import EIGHT_BIT_PRODUCTS, load

_MULTIPLE, _ROWS = 8, 32
"""Of the product of a GPU: inputs and outputs come in multiples of so many, and there are at least so many rows."""


class Int8:
    """A `Base` (linear.py): weight is about q * scale, one scale for each output, and once more turned, one for each input.

    Each row of what is multiplied gets a scale of its own when it comes. Sums are whole numbers, so they are exact; what is
    lost is the rounding of weight and row to 255 steps, beside which a second rounding of the result in bfloat16 is small. The matrix takes 2 bytes a weight: one for each direction.

    Args:
        weight_OI: any float dtype, on the device where it stays.
    Source: the scheme of arXiv 2208.07339 without its outliers, forward and backward.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        product = load(EIGHT_BIT_PRODUCTS.get(weight_OI.device.type, EIGHT_BIT_PRODUCTS["others"]))
        q_OI, scale_O = rounded(weight_OI)
        self._forward = product(q_OI, scale_O)
        # Backward multiplies by the same matrix that forward did, rounded once more for its other direction.
        self._backward = product(*rounded((q_OI.float() * scale_O[:, None]).T))

    def prepare(self, x_NI: Tensor) -> Any:
        """See `Base.prepare`: the rows in eight bits, and the dtype to come back to."""
        return self._forward.rows(x_NI), x_NI.dtype

    def forward(self, prepared: Any, add_NO: Tensor | None = None) -> Tensor:
        """See `Base.forward`."""
        rows, dtype = prepared
        return self._forward(rows, dtype, add_NO)

    def backward(self, grad_NO: Tensor, add_NI: Tensor | None = None) -> Tensor:
        """See `Base.backward`."""
        return self._backward(self._backward.rows(grad_NO), grad_NO.dtype, add_NI)

    def dense(self) -> Tensor:
        """The matrix that forward multiplies by, float32 [O, I]."""
        return self._forward.q.float() * self._forward.scale[:, None]

    def __deepcopy__(self, memo: Any) -> Int8:
        """Itself: nothing changes it, and oneDNN's layout has no copy."""
        return self


def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): int8 [O, I] and float32 [O], the largest of each row being 127."""
    wide = weight_OI.float()
    scale_O = wide.abs().amax(1).clamp_min(1e-20) / 127
    return (wide / scale_O[:, None]).round().to(torch.int8), scale_O


class Product:
    """rows @ q.T * scale by torch's product of eight-bit matrices.

    On a GPU it wants more than 16 rows, and inputs and outputs in multiples of 8; zeros stand for what is missing. On a CPU it
    takes any size, but is wrong for a single input (torch 2.13), which this mends as well.
    """

    def __init__(self, q_OI: Tensor, scale_O: Tensor) -> None:
        self._outputs, self._inputs = q_OI.shape
        self._padded = pad(q_OI, (0, -self._inputs % _MULTIPLE, 0, -self._outputs % _MULTIPLE)).contiguous()
        self.scale = scale_O

    @property
    def q(self) -> Tensor:
        """int8 [O, I]."""
        return self._padded[: self._outputs, : self._inputs]

    def rows(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """The rows as int8, and the scale of each, float32 [N, 1]."""
        q, scale_N = rounded(x_NI)
        return q, scale_N[:, None]

    def __call__(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype, add_NO: Tensor | None = None) -> Tensor:
        """[N, O], and what is to be added."""
        q, scale_N1 = rows
        padded = pad(q, (0, -self._inputs % _MULTIPLE, 0, max(0, _ROWS - len(q))))
        y = torch._int_mm(padded.contiguous(), self._padded.T)  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
        scaled = (y[: len(q), : self._outputs] * scale_N1).mul_(self.scale)
        return (scaled if add_NO is None else scaled.add_(add_NO)).to(dtype)


class PackedProduct:
    """The same by oneDNN, which multiplies unsigned rows (128 stands for zero) by a matrix laid out for it beforehand."""

    def __init__(self, q_OI: Tensor, scale_O: Tensor) -> None:
        self.scale = scale_O
        self._packed = torch.ops.onednn.qlinear_prepack(q_OI.contiguous(), [1024, q_OI.shape[1]])
        self._zeros = torch.zeros(len(q_OI), dtype=torch.int32)

    @property
    def q(self) -> Tensor:
        """int8 [O, I], read back."""
        return self._packed.to_dense().T

    def rows(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """The rows as uint8, and the scale of each, float32 [N, 1]."""
        from pantheraml.kernels.cpu import round_rows

        return round_rows(x_NI)

    def __call__(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype, add_NO: Tensor | None = None) -> Tensor:
        """[N, O], and what is to be added."""
        from pantheraml.kernels.cpu import scale_rows_

        q, scale_N1 = rows
        out = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
        y = torch.ops.onednn.qlinear_pointwise(q, 1.0, 128, self._packed, self.scale, self._zeros, None, 1.0, 0, out, "none", [], "")
        return scale_rows_(y, scale_N1, add_NO).to(dtype)
