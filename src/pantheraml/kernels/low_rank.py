"""Adding an adapter's part to a layer's results; and from their gradient, those of the skinny product and of b.

Letters: N tokens, O outputs, R rank.
"""

from __future__ import annotations

from torch import Tensor


def reference_add(y_NO: Tensor, low_NR: Tensor, b_OR: Tensor, scale: float) -> None:
    """y += scale * low @ b.T, in place, with b in the dtype of y (in C++ it stays float32 where the CPU has no bfloat16 products)."""
    y_NO.addmm_(low_NR, b_OR.to(y_NO.dtype).T, alpha=scale)


def reference_backward(grad_NO: Tensor, low_NR: Tensor, b_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of low, in the dtype of grad, and of b, in its own. torch.compile looks inside: nothing is changed in place."""
    return (grad_NO @ b_OR.to(grad_NO.dtype)) * scale, (grad_NO.T @ low_NR).to(b_OR.dtype) * scale
