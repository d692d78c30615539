"""The operations on a CPU: the C++ kernels where they are built and know the dtype, the references in torch elsewhere."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels import attention as _attention
from pantheraml.kernels import cross_entropy as _cross_entropy
from pantheraml.kernels import gated as _gated
from pantheraml.kernels import low_rank as _low_rank
from pantheraml.kernels import rms_norm as _rms_norm
from pantheraml.kernels import rope as _rope
from pantheraml.kernels.native import opened

_LETTERS = {torch.float32: "f", torch.bfloat16: "h"}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_LANES = 16
"""Numbers of a vector: attention's heads are whole vectors."""
_PART_ROWS, _PARTS = 256, 16
"""Rows whose sum is made at once, and into how many parts a sum over rows is cut at most."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """See rms_norm.py."""
    names = _letters(x) + _letters(x if weight is None else weight)
    kernels = opened() if len(names) == 2 else None
    if kernels is None:
        return _rms_norm.reference(x, weight, eps, offset)
    x = _rows(x)
    y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[0])
    weight = None if weight is None else weight.contiguous()
    _call(kernels, f"rms_norm_{names}", x, x.stride(0), weight, y, rstd, *x.shape, eps, offset)
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, add: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """See rms_norm.py."""
    names = _letters(x, dy, *(() if add is None else (add,))) + _letters(x if weight is None else weight)
    kernels = opened() if len(names) == 2 else None
    if kernels is None:
        return _rms_norm.reference_backward(dy, x, weight, rstd, offset, add, need_weight)
    dy, x, add = _rows(dy), _rows(x), None if add is None else _rows(add)
    dx = torch.empty(x.shape, dtype=x.dtype)
    sums = torch.empty(-(-x.shape[0] // 64), x.shape[1]) if need_weight else None
    steps = (dy, dy.stride(0), x, x.stride(0), weight if weight is None else weight.contiguous(), rstd)
    more = (add, 0 if add is None else add.stride(0), dx, sums)
    _call(kernels, f"rms_norm_backward_{names}", *steps, *more, *x.shape, offset)
    return dx, torch.empty(0) if sums is None else sums.sum(0)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See gated.py."""
    letter = _letters(gate, up)
    kernels = opened() if letter else None
    if kernels is None:
        return _gated.reference(gate, up, activation)
    gate, up = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _call(kernels, f"gated_{letter}", gate, gate.stride(0), up, up.stride(0), out, *gate.shape, _ACTIVATIONS[activation])
    return out


def gated_backward(da: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """See gated.py."""
    letter = _letters(gate, up, da)
    kernels = opened() if letter else None
    if kernels is None:
        return _gated.reference_backward(da, gate, up, activation)
    da, gate, up = _rows(da), _rows(gate), _rows(up)
    dgate, dup, out = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(3))
    given = (da, da.stride(0), gate, gate.stride(0), up, up.stride(0))
    _call(kernels, f"gated_backward_{letter}", *given, dgate, dup, out, *gate.shape, _ACTIVATIONS[activation])
    return dgate, dup, out


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """See rope.py."""
    letter = _letters(x)
    kernels = opened() if letter and cos.dtype == sin.dtype == torch.float32 else None
    if kernels is None:
        return _rope.reference(x, cos, sin, interleaved, inverse)
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    given = (x, x.stride(0), x.stride(1), cos.contiguous(), sin.contiguous(), y, *x.shape, cos.shape[1])
    _call(kernels, f"rope_{letter}", *given, interleaved, -1.0 if inverse else 1.0)
    return y


def cross_entropy(logits: Tensor, labels: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor:
    """See cross_entropy.py."""
    letter = _letters(logits)
    kernels = opened() if letter and logits.is_contiguous() else None
    if kernels is None:
        return _cross_entropy.reference(logits, labels, scale, softcap, gradient)
    loss = torch.empty(logits.shape[0])
    _call(kernels, f"cross_entropy_{letter}", logits, labels.contiguous(), loss, *logits.shape, scale, softcap, gradient)
    return loss


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """See attention.py."""
    letter = _letters(q, k, v)
    kernels = opened() if letter and q.shape[2] % _LANES == 0 else None
    if kernels is None:
        return _attention.reference(q, k, v, starts, longest, scale, window, softcap)
    q, k, v = map(_heads, (q, k, v))
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], q.shape[0])
    steps = _steps(q, k, v)
    _call(kernels, f"attention_{letter}", q, k, v, steps, out, lse, starts, len(starts) - 1, *_sizes(q, k, window, scale, softcap))
    return out, lse


def attention_backward(
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
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See attention.py."""
    letter = _letters(q, k, v, dout)
    kernels = opened() if letter and q.shape[2] % _LANES == 0 else None
    if kernels is None:
        return _attention.reference_backward(dout, q, k, v, out, lse, starts, longest, scale, window, softcap)
    dout, q, k, v, out = map(_heads, (dout, q, k, v, out))
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
    steps = _steps(dout, q, k, v, out)
    given = (dout, q, k, v, out, steps, lse, dq, dk, dv, starts, len(starts) - 1)
    _call(kernels, f"attention_backward_{letter}", *given, *_sizes(q, k, window, scale, softcap))
    return dq, dk, dv


def low_rank_add(y: Tensor, low: Tensor, b: Tensor, scale: float) -> None:
    """See low_rank.py."""
    kernels = _low_rank_kernels(y, low, b)
    if kernels is None or y.stride(1) != 1:
        _low_rank.reference_add(y, low, b, scale)
        return
    low = _rows(low)
    given = (y, y.stride(0), low, low.stride(0), b.contiguous())
    _call(kernels, f"low_rank_add_{_letters(y)}{_letters(b)}", *given, *y.shape, b.shape[1], scale)


def low_rank_backward(grad: Tensor, low: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See low_rank.py."""
    kernels = _low_rank_kernels(grad, low, b)
    if kernels is None:
        return _low_rank.reference_backward(grad, low, b, scale)
    grad, low = _rows(grad), _rows(low)
    grad_low, grad_b = torch.empty(low.shape, dtype=grad.dtype), torch.empty(b.shape, dtype=b.dtype)
    rows, (outputs, rank) = grad.shape[0], b.shape
    pieces = -(-rows // _PART_ROWS)
    part_rows = _PART_ROWS * max(1, -(-pieces // _PARTS))
    sums = torch.empty(-(-rows // part_rows), -(-rank // _LANES) * _LANES, outputs)
    given = (grad, grad.stride(0), b.contiguous(), low, low.stride(0), grad_b, grad_low, sums)
    _call(kernels, f"low_rank_backward_{_letters(grad)}{_letters(b)}", *given, part_rows, rows, outputs, rank, scale)
    return grad_low, grad_b


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): rows rounded to eight bits, uint8 with 128 for zero; x is about (q - 128) * scale, float32 [N, 1]."""
    letter = _letters(x)
    kernels = opened() if letter else None
    if kernels is None:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
        return ((x.float() / scale).round() + 128).to(torch.uint8), scale
    x = _rows(x)
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0], 1)
    _call(kernels, f"round_rows_{letter}", x, x.stride(0), q, scale, *x.shape)
    return q, scale


def scale_rows_(y: Tensor, scale: Tensor, add: Tensor | None = None) -> Tensor:
    """y * scale + add, in place; scale is float32 [N, 1], add like y."""
    letter = _letters(y, *(() if add is None else (add,)))
    kernels = opened() if letter and y.is_contiguous() else None
    if kernels is None:
        scaled = y.float() * scale
        return y.copy_(scaled if add is None else scaled + add.float())
    _call(kernels, f"scale_rows_{letter}", y, scale, None if add is None else add.contiguous(), *y.shape)
    return y


def _low_rank_kernels(rows: Tensor, low: Tensor, b: Tensor) -> CDLL | None:
    """None where the shape or the dtypes are not for the kernels."""
    known = _letters(rows, low) + _letters(b) in ("ff", "hf", "hh") and b.shape[0] % _LANES == 0
    return opened() if known else None


def _letters(first: Tensor, *others: Tensor) -> str:
    """The letter of the dtype that all have; empty where the kernels do not know it, or they differ."""
    return _LETTERS.get(first.dtype, "") if all(each.dtype == first.dtype for each in others) else ""


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _steps(*matrices: Tensor) -> Any:
    """Distances of tokens and heads of each, as an array of C."""
    steps = [step for each in matrices for step in each.stride()[:2]]
    return (c_int64 * len(steps))(*steps)


def _sizes(q: Tensor, k: Tensor, window: int, scale: float, softcap: float) -> tuple[int | float, ...]:
    tokens, heads, width = q.shape
    return tokens, heads, k.shape[1], width, window, scale, softcap


def _call(kernels: CDLL, name: str, *given: Any) -> None:
    """Calls a C function: a tensor is its address, a bool an int, an int 64 bits, a float 32 bits; the threads come last."""
    arguments: list[Any] = []
    for each in given:
        if each is None:
            arguments.append(c_void_p(None))
        elif isinstance(each, Tensor):
            arguments.append(c_void_p(each.data_ptr()))
        elif isinstance(each, bool):
            arguments.append(c_int(each))
        elif isinstance(each, int):
            arguments.append(c_int64(each))
        elif isinstance(each, float):
            arguments.append(c_float(each))
        else:
            arguments.append(each)
    kernels[name](*arguments, c_int(torch.get_num_threads()))
