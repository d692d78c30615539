"""Products in eight-bit floats against float64 of the matrix that they say they hold. torch multiplies them on a CPU as well."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import Tensor

from pantheraml.kernels.fp8 import E4M3, Fp8, rounded, unfit
from pantheraml.kernels.linear import Projection, linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(16, 16), (48, 32), (32, 160), (208, 304)]
RESULT = 2.0**-8  # of the result, which is bfloat16 whatever the dtype


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounding(x: Tensor, dim: int = 1) -> Tensor:
    """The largest error of each value: half of the last of four bits, or of the smallest step, where 448 is the largest of the row."""
    wide = x.double().abs()
    return torch.maximum(wide * 2**-4, wide.amax(dim, keepdim=True).clamp_min(1e-20) / 448 * 2**-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounded_row_is_the_row_to_its_last_bit(dtype: torch.dtype) -> None:
    x = drawn(50, 70).to(dtype) * torch.logspace(-4, 4, 50)[:, None].to(dtype)
    q, scale = rounded(x)
    assert q.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (50, 1)
    assert (q.float().abs().amax(1) == 448).all()
    assert ((q.double() * scale.double() - x.double()).abs() <= 1.0001 * rounding(x)).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_matrix_is_the_weight_to_its_last_bit(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    dense = Fp8(weight).dense()
    assert dense.dtype == torch.float32
    assert ((dense.double() - weight.double()).abs() <= 1.0001 * rounding(weight)).all()


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_that_of_the_matrix_but_for_the_rounding_of_the_rows(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, x = Fp8(drawn(*shape)), drawn(rows, shape[1], seed=1).to(dtype)
    y, matrix = base.forward(base.prepare(x)), base.dense().double()
    assert y.dtype == dtype and y.shape == (rows, shape[0])
    exact, bound = x.double() @ matrix.T, rounding(x) @ matrix.abs().T
    assert ((y.double() - exact).abs() <= 1.0001 * bound + RESULT * (exact.abs() + bound)).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_input_is_that_of_the_same_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, grad = Fp8(drawn(*shape)), drawn(7, shape[0], seed=2).to(dtype)
    found, matrix = base.backward(grad), base.dense().double()
    assert found.dtype == dtype and found.shape == (7, shape[1])
    exact = grad.double() @ matrix
    # The matrix is rounded once more, by its columns; and the gradient by its rows.
    bound = rounding(grad) @ matrix.abs() + (grad.double().abs() + rounding(grad)) @ rounding(matrix, 0)
    assert ((found.double() - exact).abs() <= 1.0001 * bound + RESULT * (exact.abs() + bound)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_added_is_added_and_left_as_it_was(dtype: torch.dtype) -> None:
    base, x, grad = Fp8(drawn(48, 32)), drawn(7, 32, seed=1).to(dtype), drawn(7, 48, seed=2).to(dtype)
    forward, backward = drawn(7, 48, seed=3).to(dtype), drawn(7, 32, seed=4).to(dtype)
    before = (forward.clone(), backward.clone())
    assert base.forward(base.prepare(x), forward).equal(base.forward(base.prepare(x)) + forward)
    assert base.backward(grad, backward).equal(base.backward(grad) + backward)
    assert before[0].equal(forward) and before[1].equal(backward)


def test_what_is_rounded_twice_is_rounded_independently() -> None:
    """A value of four bits is wrong by 1 / (2 sqrt(3)) of its last bit, between 1/16 and 1/8 of it: 2.6 % of a normal row."""
    base, x = Fp8(drawn(304, 1008)), drawn(200, 1008, seed=1)
    exact = x.double() @ base.dense().double().T
    error = (base.forward(base.prepare(x)).double() - exact).norm() / exact.norm()
    assert 0.02 < error < 0.03


def test_rows_of_zeros_stay_zeros() -> None:
    weight, x = drawn(32, 48), drawn(4, 48, seed=1)
    weight[3], weight[:, 5], x[2] = 0, 0, 0
    base = Fp8(weight)
    y, grad = base.forward(base.prepare(x)), base.backward(drawn(4, 32))
    assert not y[2].any() and not y[:, 3].any() and y.isfinite().all()
    assert not grad[:, 5].any() and grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_what_is_no_number_gives_none_and_the_others_do(bad: float, dtype: torch.dtype) -> None:
    base = Fp8(drawn(32, 48))
    for place in range(48):
        x = drawn(3, 48, seed=1).to(dtype)
        x[1, place] = bad
        y = base.forward(base.prepare(x))
        assert not y[1].isfinite().any(), place
        assert y[0].isfinite().all() and y[2].isfinite().all(), place


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_shows(bad: float) -> None:
    weight = drawn(32, 48)
    weight[3, 7] = bad
    base = Fp8(weight)
    assert not base.dense()[3].isfinite().any()
    y = base.forward(base.prepare(drawn(2, 48)))
    assert not y[:, 3].isfinite().any() and y[:, :3].isfinite().all()
    assert not base.backward(drawn(2, 32)).isfinite().any()


def test_no_rows_are_no_error() -> None:
    x = torch.zeros(0, 48, requires_grad=True)
    y = linear(x, Projection(None, drawn(32), base=Fp8(drawn(32, 48))))
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_it_is_the_layer_on_its_matrix(dtype: torch.dtype) -> None:
    base, bias_O = Fp8(drawn(96, 128)), drawn(96, seed=3)
    x, a, b, upstream = drawn(40, 128, seed=1).to(dtype), drawn(8, 128, seed=4), drawn(96, 8, seed=5), drawn(40, 96, seed=6)
    leaves = [each.requires_grad_() for each in (x, a, b)]
    y = linear(x, Projection(None, bias_O, a, b, 0.5, base))
    found = torch.autograd.grad(y, leaves, upstream.to(dtype))
    wide = [each.detach().double().requires_grad_() for each in leaves]
    exact = wide[0] @ base.dense().double().T + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T + bias_O.double()
    wanted = torch.autograd.grad(exact, wide, upstream.to(dtype).double())
    # 2.6 % of the product with the base for each rounding, of which the gradient has two.
    for name, mine, true in zip(("y", "x"), (y.detach(), found[0]), (exact.detach(), wanted[0]), strict=True):
        assert (mine.double() - true).norm() < 0.04 * true.norm(), name
    # What the adapter gets does not go through eight bits.
    for name, mine, true in zip(("a", "b"), found[1:], wanted[1:], strict=True):
        assert (mine.double() - true).norm() < (0.01 if dtype == torch.bfloat16 else 1e-6) * true.norm(), name


@pytest.mark.parametrize("shape", [(17, 32), (32, 24), (1, 16), (8, 8)], ids=str)
def test_sizes_that_a_gpu_does_not_multiply_are_refused(shape: tuple[int, int]) -> None:
    why = unfit(torch.empty(shape))
    assert why == f"a matrix of {shape} has a side that is no multiple of 16"
    with pytest.raises(ValueError, match="no multiple of 16"):
        Fp8(torch.empty(shape))


def test_it_stays_where_the_weight_is_and_lies_as_a_gpu_wants_it() -> None:
    """torch's check without a device wants what CUDA wants: the second matrix by columns, scales one after the other."""
    base = Fp8(torch.empty(32, 48, device="meta"))
    x = torch.empty(48, 5, device="meta", dtype=torch.bfloat16).T  # rows that do not lie one after the other
    y = base.forward(base.prepare(x))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (5, 32))
    grad = base.backward(y)
    assert (grad.device.type, grad.dtype, grad.shape) == ("meta", torch.bfloat16, (5, 48))


def test_operands_lie_by_rows_and_the_result_is_one_that_every_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    real, results = torch._scaled_mm, []

    def checked(a: Tensor, b: Tensor, **rest: object) -> Tensor:
        assert a.dtype == b.dtype == E4M3
        assert a.is_contiguous() and b.T.is_contiguous() and a.shape[1] % 16 == b.shape[1] % 16 == 0
        assert isinstance(rest["scale_a"], Tensor) and rest["scale_a"].shape == (len(a), 1) and rest["scale_a"].is_contiguous()
        assert isinstance(rest["scale_b"], Tensor) and rest["scale_b"].shape == (1, b.shape[1]) and rest["scale_b"].is_contiguous()
        results.append(rest["out_dtype"])
        return real(a, b, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    base = Fp8(drawn(48, 32).T.contiguous().T)
    for x in (drawn(5, 32), drawn(32, 5).T):
        base.forward(base.prepare(x))
    base.backward(drawn(48, 5).T)
    assert results == [torch.bfloat16] * 3


def test_it_keeps_two_bytes_a_weight_and_no_weight() -> None:
    weight = drawn(64, 128)
    gone = weakref.ref(weight)
    base = Fp8(weight)
    del weight
    assert gone() is None
    parts = [part for held in vars(base).values() if isinstance(held, tuple) for part in held]
    assert sum(part.untyped_storage().nbytes() for part in parts) == 2 * 64 * 128 + 4 * (64 + 128)
    assert copy.deepcopy(base) is base
