"""Runs Triton kernels without a GPU, by Triton's interpreter, and with one where there is one.

The interpreter has to be chosen before Triton is imported, and it leaves Triton's language changed. So it has a process of its own,
and no other test meets it. A kernel that writes into a tensor writes into the caller's: both processes see one memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton", reason="triton is not installed")

DEVICES = [
    "interpreter",
    *(pytest.param(kind, marks=pytest.mark.gpu) for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()),
]


def run(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns for `arguments` on `device`, with its tensors on the CPU."""
    if device == "interpreter":
        return _interpreter().submit(function, *arguments).result()
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    result = tree_map_only(Tensor, Tensor.cpu, function(*moved))
    for mine, theirs in zip(arguments, moved, strict=True):
        if isinstance(mine, Tensor) and mine.is_contiguous():
            mine.copy_(theirs)
    return result


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_become_a_device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        pool.submit(int).result()  # the process starts here, with this environment
    return pool


def _become_a_device() -> None:
    """Repair the interpreter's bfloat16 and eight-bit floats: it rounds towards zero, and multiplies matrices of the bits read as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target in (tl.bfloat16, tl.float8e4nv):
            wide = torch.from_numpy(np.array(data, np.float32))
            if target == tl.bfloat16:
                return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding_mode)

    def multiplied(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.create_fp_ext(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
        return dot(self, a, b, *others)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = multiplied


def errs_no_more(ours: Tensor, stock: Tensor, exact: Tensor, name: str = "") -> None:
    """Fails unless ours is within 1.1 of stock torch's error in the same dtype; float32: or within 1e-5 of the size of what is right.

    Below 1e-6 an element (where what is right is 0, a few roundings of numbers about 1), whose error is smaller is luck.
    """
    assert ours.shape == exact.shape == stock.shape, name
    assert torch.isfinite(ours).all(), name
    exact = exact.detach().double()
    error, stock_error = (float((each.detach().double() - exact).norm()) for each in (ours, stock))
    limit = max(1.1 * stock_error, 1e-5 * float(exact.norm())) if ours.dtype == torch.float32 else 1.1 * stock_error
    limit += 1e-6 * exact.numel() ** 0.5
    assert error <= limit, f"{name}: {error:.3g} where stock torch errs by {stock_error:.3g}, size {float(exact.norm()):.3g}"
