"""The norm in Triton against its definition in float64 and Hugging Face's own norm in the same dtype."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.interpreted import DEVICES, errs_no_more, run
from torch import Tensor

from pantheraml.kernels.rms_norm_triton import PARTIAL_SUMS, rms_norm, rms_norm_backward

EPS = 1e-5
F32, BF16 = torch.float32, torch.bfloat16


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def definition(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    factor = offset if weight is None else offset + weight
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * factor


def stock(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """As Hugging Face writes it for Llama; with an offset, for Gemma."""
    h = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + EPS)
    if offset:
        return (h * (offset if weight is None else offset + weight.float())).to(x.dtype)
    assert weight is not None
    return weight.to(x.dtype) * h.to(x.dtype)


def check(device: str, x: Tensor, weight: Tensor | None, offset: float, add: Tensor | None) -> None:
    dy = drawn(*x.shape, dtype=x.dtype, seed=3)
    y, rstd = run(device, rms_norm, x, weight, EPS, offset)
    dx, dw = run(device, rms_norm_backward, dy, x, weight, rstd, offset, add, weight is not None)
    assert (y.dtype, rstd.dtype, dx.dtype, dw.dtype) == (x.dtype, F32, x.dtype, F32)
    leaves = [x.double().requires_grad_(), None if weight is None else weight.double().requires_grad_()]
    wanted = definition(leaves[0], leaves[1], offset)
    others = [x.clone().requires_grad_(), None if weight is None else weight.clone().requires_grad_()]
    found = stock(others[0], others[1], offset)
    exact = list(torch.autograd.grad(wanted, [leaf for leaf in leaves if leaf is not None], dy.double()))
    theirs = list(torch.autograd.grad(found, [leaf for leaf in others if leaf is not None], dy))
    if add is not None:
        exact[0], theirs[0] = exact[0] + add.double(), theirs[0] + add
    errs_no_more(y, found, wanted, "y")
    errs_no_more(rstd, torch.rsqrt(x.square().mean(1) + EPS), (x.double().square().mean(1) + EPS).rsqrt(), "rstd")
    errs_no_more(dx, theirs[0], exact[0], "dx")
    if weight is None:
        assert dw.shape == (0,)
    else:
        errs_no_more(dw, theirs[1], exact[1], "dw")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 96), (5, 100), (70, 33), (3, 2500)], ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradients(device: str, shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype, offset: float) -> None:
    x, weight = drawn(*shape, dtype=dtype, seed=0), drawn(shape[1], dtype=weight_dtype, seed=1)
    check(device, x, weight, offset, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_residuals_gradient_is_added_before_the_rounding(device: str, dtype: torch.dtype) -> None:
    x, weight = drawn(6, 100, dtype=dtype, seed=0), drawn(100, dtype=dtype, seed=1)
    check(device, x, weight, 0.0, drawn(6, 100, dtype=dtype, seed=2))


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_weight_the_offset_is_the_factor(device: str) -> None:
    check(device, drawn(5, 100, dtype=BF16, seed=0), None, 1.0, None)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_apart(device: str) -> None:
    wide, add = drawn(7, 3 * 96, dtype=BF16, seed=0), drawn(7, 2 * 96, dtype=BF16, seed=2)
    check(device, wide[:, 96:192], drawn(96, dtype=F32, seed=1), 0.0, add[:, :96])
    x, weight = wide[:, :96], drawn(96, dtype=F32, seed=1)
    _, rstd = run(device, rms_norm, x, weight, EPS, 0.0)
    for dy in (torch.ones((), dtype=BF16).expand(7, 96), drawn(96, 7, dtype=BF16, seed=4).T):  # a sum's gradient; a transpose's
        apart = run(device, rms_norm_backward, dy, x, weight, rstd, 0.0, None, True)
        together = run(device, rms_norm_backward, dy.contiguous(), x.contiguous(), weight, rstd, 0.0, None, True)
        assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_weights_gradient_over_more_rows_than_partial_sums(device: str) -> None:
    x, weight = drawn(PARTIAL_SUMS + 5, 1100, dtype=BF16, seed=0), drawn(1100, dtype=F32, seed=1)
    check(device, x, weight, 0.0, None)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_are_equal(device: str) -> None:
    x, weight = drawn(70, 100, dtype=BF16, seed=0), drawn(100, dtype=F32, seed=1)
    _, rstd = run(device, rms_norm, x, weight, EPS, 0.0)
    first, second = (run(device, rms_norm_backward, x, x, weight, rstd, 0.0, None, True)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_are_no_error(device: str) -> None:
    x, weight = torch.zeros(0, 100), torch.ones(100)
    y, rstd = run(device, rms_norm, x, weight, EPS, 0.0)
    dx, dw = run(device, rms_norm_backward, x, x, weight, rstd, 0.0, None, True)
    assert (y.shape, rstd.shape, dx.shape) == ((0, 100), (0,), (0, 100))
    assert torch.equal(dw, torch.zeros(100))
