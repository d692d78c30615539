"""Linear layers with their low-rank additions, and what stands right before and after them, as one operation.

Before them may stand a norm or a gate, after a single one the sum with the residual. Taken together they keep only what
cannot be had again cheaply: the norm's input instead of its result, gate and up instead of their product, and one [N, R]
product for all adapters of the layers that share an input.

Letters: N tokens, I inputs, O outputs, R rank (of all adapters of the group together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pantheraml.kernels.gated import Activation
from pantheraml.kernels.operations import ops


class Base(Protocol):
    """A frozen matrix [O, I] that is held in another form than its numbers."""

    def prepare(self, x_NI: Tensor) -> Any:
        """What `forward` multiplies, made once for all layers that share an input."""
        ...

    def forward(self, prepared: Any, add_NO: Tensor | None = None) -> Tensor:
        """x @ weight.T, in the dtype of x; and what is to be added, which has that dtype too and is not changed."""
        ...

    def backward(self, grad_NO: Tensor, add_NI: Tensor | None = None) -> Tensor:
        """grad @ weight, in the dtype of grad; and what is to be added."""
        ...


@dataclass(frozen=True, slots=True)
class Projection:
    """x @ weight.T + bias + scale * (x @ a.T) @ b.T.

    Attributes:
        weight_OI: of any dtype, frozen or not; None where `base` holds it.
        a_RI, b_OR: the adapter, usually trained and float32; None: there is none.
    """

    weight_OI: Tensor | None
    bias_O: Tensor | None = None
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    scale: float = 1.0
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """See rms_norm.py."""

    weight_I: Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class _Spec:
    """All of a call that is no tensor."""

    bases: tuple[Base | None, ...]
    scales: tuple[float, ...]
    eps: float | None
    offset: float
    activation: Activation | None
    factor: float
    keep: bool
    through: bool
    unread: bool


def linears(
    x_NI: Tensor, projections: Sequence[Projection], *, norm: Norm | None = None, keep: bool = False, through: bool = False
) -> tuple[Tensor, ...]:
    """Several layers on one input, [N, O] each, in the dtype of x; weights of another dtype are cast for the product.

    Args:
        x_NI: rows.
        norm: applied to x first; its result is computed again in backward.
        keep: keep the norm's result instead, for N * I more elements.
        through: x is given back as the last result; a gradient for it is added to the norm's without another pass.
    Source: LoRA is arXiv 2106.09685.
    """
    spec = _spec(projections, norm=norm, keep=keep, through=through)
    result: tuple[Tensor, ...] = _Linears.apply(spec, x_NI, None, None if norm is None else norm.weight_I, None, *_tensors(projections))
    return result


def linear(x_NI: Tensor, projection: Projection, *, residual_NO: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """residual + factor * projection(x)."""
    result: tuple[Tensor, ...] = _Linears.apply(_spec([projection], factor=factor), x_NI, None, None, residual_NO, *_tensors([projection]))
    return result[0]


def gated_linear(
    gate_NI: Tensor,
    up_NI: Tensor,
    activation: Activation,
    projection: Projection,
    *,
    residual_NO: Tensor | None = None,
    factor: float = 1.0,
    keep: bool = False,
    unread: bool = False,
) -> Tensor:
    """residual + factor * projection(act(gate) * up); the product is computed again in backward, unless it is to be kept.

    Args:
        unread: the residual is given, and of the result nothing is looked at but its shape; for a layer that is computed
            again only for what it keeps.
    """
    spec = _spec([projection], activation=activation, factor=factor, keep=keep, unread=unread)
    result: tuple[Tensor, ...] = _Linears.apply(spec, gate_NI, up_NI, None, residual_NO, *_tensors([projection]))
    return result[0]


def _spec(
    projections: Sequence[Projection],
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    factor: float = 1.0,
    keep: bool = False,
    through: bool = False,
    unread: bool = False,
) -> _Spec:
    return _Spec(
        bases=tuple(each.base for each in projections),
        scales=tuple(each.scale for each in projections),
        eps=None if norm is None else norm.eps,
        offset=0.0 if norm is None else norm.offset,
        activation=activation,
        factor=factor,
        keep=keep,
        through=through,
        unread=unread,
    )


def _tensors(projections: Sequence[Projection]) -> list[Tensor | None]:
    return [tensor for each in projections for tensor in (each.weight_OI, each.bias_O, each.a_RI, each.b_OR)]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, x: Tensor, up: Tensor | None, norm_I: Tensor | None, residual: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.spec = spec
        # In the dtype of x by hand: autocast would cast once more, and remember the casts.
        with torch.autocast(x.device.type, enabled=False):
            h, rstd = _input(spec, x, up, norm_I)
            weights, biases, downs, ups = (tensors[i::4] for i in range(4))
            low = _low(h, downs)
            results, prepared, column = [], None, 0
            for base, weight, bias, a, b, scale in zip(spec.bases, weights, biases, downs, ups, spec.scales, strict=True):
                if spec.unread and residual is not None:
                    results.append(torch.empty_like(residual))
                    continue
                if base is not None and prepared is None:
                    prepared = base.prepare(h)
                y = _product(h, prepared, base, weight, bias, residual, spec.factor)
                if a is not None and b is not None and low is not None:
                    ops.low_rank_add(y, low[:, column : column + len(a)], b, scale * spec.factor)
                    column += len(a)
                results.append(y)
        kept = h if spec.keep and h is not x else None
        ctx.save_for_backward(x, up, norm_I, rstd, kept, low, *tensors)
        ctx.has_residual = residual is not None
        return (*results, x.view_as(x)) if spec.through else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        spec: _Spec = ctx.spec
        x, up, norm_I, rstd, h, low, *tensors = ctx.saved_tensors
        _, need_x, need_up, need_norm, need_residual, *need = ctx.needs_input_grad
        weights, biases, downs, ups = (tensors[i::4] for i in range(4))
        given = grads[: len(spec.bases)]
        through = grads[-1] if spec.through else None
        found: list[Tensor | None] = [None] * len(tensors)
        need_input = need_x or need_up or need_norm
        grad_input: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            scaled = [grad if spec.factor == 1.0 else grad * spec.factor for grad in given]
            lows: list[Tensor] = []  # gradients of low, a piece for each adapter
            column = 0
            for i, (grad, base, weight, a, b) in enumerate(zip(scaled, spec.bases, weights, downs, ups, strict=True)):
                if need[4 * i + 1]:
                    found[4 * i + 1] = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(biases[i].dtype)
                if a is not None and b is not None:
                    grad_low, grad_b = ops.low_rank_backward(grad, low[:, column : column + len(a)], b, spec.scales[i])
                    found[4 * i + 3] = grad_b if need[4 * i + 3] else None
                    lows.append(grad_low)
                    column += len(a)
                if need_input:
                    grad_input = _back(grad, base, weight, grad_input)
            low_grad = None if not lows else lows[0] if len(lows) == 1 else torch.cat(lows, 1)
            if grad_input is not None and low_grad is not None:
                grad_input.addmm_(low_grad, _stacked(downs, low_grad.dtype))

            # Now what stands before the layers, whose result is had again on the way.
            grad_x = grad_up = grad_norm = None
            need_h = any(need[0::4]) or any(need[2::4])
            if spec.activation is not None:
                if grad_input is not None:
                    grad_x, grad_up, again = ops.gated_backward(grad_input, x, up, spec.activation)
                    h = again if h is None else h
                elif need_h and h is None:
                    h = ops.gated(x, up, spec.activation)
            elif spec.eps is not None:
                if need_h and h is None:
                    h = ops.rms_norm(x, norm_I, spec.eps, spec.offset)[0]
                if grad_input is not None:
                    grad_x, grad_norm = ops.rms_norm_backward(grad_input, x, norm_I, rstd, spec.offset, through, need_norm)
                    grad_norm = grad_norm.to(norm_I.dtype) if need_norm else None
            else:
                h = x
                grad_x = grad_input if through is None or grad_input is None else grad_input.add_(through)

            if low_grad is not None and any(need[2::4]):
                pieces = (low_grad.T @ h).split([len(a) for a in downs if a is not None])
                for i, piece in zip([i for i, a in enumerate(downs) if a is not None], pieces, strict=True):
                    found[4 * i + 2] = piece.to(downs[i].dtype)
            for i, grad in enumerate(scaled):
                if need[4 * i]:
                    found[4 * i] = (grad.T @ h).to(weights[i].dtype)
        residual = given[0] if need_residual else None
        return (None, grad_x if need_x else None, grad_up if need_up else None, grad_norm, residual, *found)


def _input(spec: _Spec, x: Tensor, up: Tensor | None, norm_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the layers multiply, and the norm's float32 value a row."""
    if spec.activation is not None:
        return ops.gated(x, up, spec.activation), None
    if spec.eps is not None:
        return ops.rms_norm(x, norm_I, spec.eps, spec.offset)
    return x, None


def _stacked(downs: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The matrices a of a group, one below the other."""
    present = [a for a in downs if a is not None]
    return (present[0] if len(present) == 1 else torch.cat(present)).to(dtype)


def _low(h: Tensor, downs: Sequence[Tensor | None]) -> Tensor | None:
    """One skinny product for all adapters of the group, [N, R]."""
    return None if all(a is None for a in downs) else h @ _stacked(downs, h.dtype).T


def _product(
    h: Tensor, prepared: Any, base: Base | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, factor: float
) -> Tensor:
    """residual + factor * (h @ weight.T + bias)."""
    bias = None if bias is None else bias.to(h.dtype)
    if base is None:
        assert weight is not None
        if residual is not None and bias is None:
            return torch.addmm(residual, h, weight.to(h.dtype).T, alpha=factor)
        y = F.linear(h, weight.to(h.dtype), bias)
    else:
        if factor == 1.0 and bias is None:
            return base.forward(prepared, residual)
        y = base.forward(prepared)
        y = y if bias is None else y.add_(bias)
    y = y if factor == 1.0 else y.mul_(factor)
    return y if residual is None else y.add_(residual)


def _back(grad: Tensor, base: Base | None, weight: Tensor | None, so_far: Tensor | None) -> Tensor:
    """so_far + grad @ weight."""
    if base is not None:
        return base.backward(grad, so_far)
    assert weight is not None
    return grad @ weight.to(grad.dtype) if so_far is None else so_far.addmm_(grad, weight.to(grad.dtype))
