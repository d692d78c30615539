"""Products in eight-bit whole numbers against float64 of the matrix that they say they hold; the bounds are those of the rounding."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from pantheraml.hardware.cpu import multiplies_int8
from pantheraml.kernels import native
from pantheraml.kernels.int8 import Int8, PackedProduct, Product, rounded
from pantheraml.kernels.linear import Projection, linear

STEP = 1 / 254  # the largest error of a rounded value, of the largest in its row: half of 1 / 127
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 5), (17, 24), (16, 32), (64, 1), (1, 64), (33, 65), (200, 301)]
PRODUCTS = [
    Product,
    pytest.param(PackedProduct, marks=pytest.mark.skipif(not multiplies_int8(), reason="its sums would not be exact here")),
]


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Int8 computes with this one, on the CPU."""
    name = f"{request.param.__module__}:{request.param.__name__}"
    monkeypatch.setattr("pantheraml.kernels.int8.EIGHT_BIT_PRODUCTS", {"others": name})
    return request.param


@pytest.fixture(params=["C++", "torch"])
def rounding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What rounds the rows of a packed product."""
    if request.param == "C++" and native.opened() is None:
        pytest.skip(f"the C++ kernels are not here: {native.why_not()}")
    if request.param == "torch":
        monkeypatch.setattr(native._state, "opened", None)
        monkeypatch.setattr(native._state, "why_not", "a test")
    return request.param


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def most(x: Tensor, dim: int) -> Tensor:
    """The largest of each row, as a column or a row."""
    return x.double().abs().amax(dim, keepdim=True)


def result_rounding(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Twice, since a packed product rounds to its dtype before and after the scale of the row; and one unit below normal numbers."""
    return 2 * torch.finfo(dtype).eps * y.abs() + 2 * torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_matrix_is_the_weight_to_half_a_step(shape: tuple[int, int], product: Any) -> None:
    weight = drawn(*shape)
    base = Int8(weight)
    assert base.dense().dtype == torch.float32
    # 1e-6: the scale and the value that is read back are float32.
    assert (((base.dense().double() - weight.double()).abs()) <= STEP * (1 + 1e-5) * most(weight, 1)).all()
    assert Int8(weight.bfloat16()).dense().equal(Int8(weight.bfloat16().float()).dense())


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_that_of_the_matrix_but_for_the_rounding_of_the_rows(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, product: Any, rounding: str
) -> None:
    base, x = Int8(drawn(*shape)), drawn(rows, shape[1], seed=1).to(dtype)
    y, matrix = base.forward(base.prepare(x)), base.dense().double()
    assert y.dtype == dtype and y.shape == (rows, shape[0])
    exact = x.double() @ matrix.T
    bound = 1.0001 * STEP * most(x, 1) * matrix.abs().sum(1) + result_rounding(exact, dtype)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_input_is_that_of_the_same_matrix(
    shape: tuple[int, int], dtype: torch.dtype, product: Any, rounding: str
) -> None:
    base, grad = Int8(drawn(*shape)), drawn(7, shape[0], seed=2).to(dtype)
    found, matrix = base.backward(grad), base.dense().double()
    assert found.dtype == dtype and found.shape == (7, shape[1])
    exact = grad.double() @ matrix
    # The matrix is rounded once more, by its columns; and the gradient by its rows.
    of_matrix, of_grad = STEP * most(matrix, 0), STEP * most(grad, 1)
    bound = of_grad * matrix.abs().sum(0) + (grad.double().abs() + of_grad).sum(1, keepdim=True) * of_matrix
    assert ((found.double() - exact).abs() <= 1.0001 * bound + result_rounding(exact, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_added_is_added_and_left_as_it_was(dtype: torch.dtype, product: Any, rounding: str) -> None:
    base, x, grad = Int8(drawn(48, 20)), drawn(7, 20, seed=1).to(dtype), drawn(7, 48, seed=2).to(dtype)
    forward, backward = drawn(7, 48, seed=3).to(dtype), drawn(7, 20, seed=4).to(dtype)
    before = (forward.clone(), backward.clone())
    pairs = (
        (base.forward(base.prepare(x), forward), base.forward(base.prepare(x)), forward),
        (base.backward(grad, backward), base.backward(grad), backward),
    )
    for found, product_alone, added in pairs:
        exact = product_alone.double() + added.double()
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= result_rounding(exact, dtype) + result_rounding(product_alone.double(), dtype)).all()
    assert before[0].equal(forward) and before[1].equal(backward)


def test_the_error_is_that_of_independent_roundings(product: Any) -> None:
    """The bounds above would also pass if every rounding went the same way."""
    base, x = Int8(drawn(300, 1000)), drawn(200, 1000, seed=1)
    exact = x.double() @ base.dense().double().T
    error = (base.forward(base.prepare(x)).double() - exact).norm()
    expected = ((most(x, 1) / 127) ** 2 / 12 * base.dense().double().square().sum(1)).sum().sqrt()
    assert error.item() == pytest.approx(expected.item(), rel=0.02)  # 60,000 results


def test_both_products_multiply_the_same_numbers() -> None:
    q, scale = rounded(drawn(33, 65))
    for kind in (Product, PackedProduct):
        made = kind(q, scale)
        assert made.q.equal(q) and made.q.dtype == torch.int8 and made.scale.equal(scale)


def test_rows_of_zeros_stay_zeros(product: Any, rounding: str) -> None:
    weight, x = drawn(20, 24), drawn(4, 24, seed=1)
    weight[3], weight[:, 5], x[2] = 0, 0, 0
    base = Int8(weight)
    y, grad = base.forward(base.prepare(x)), base.backward(drawn(4, 20))
    assert not y[2].any() and not y[:, 3].any() and y.isfinite().all()
    assert not grad[:, 5].any() and not base.backward(torch.zeros(4, 20)).any()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e30])
def test_very_small_and_very_large_rows(size: float, product: Any, rounding: str) -> None:
    base, x = Int8(drawn(20, 24)), drawn(3, 24, seed=1)
    x[1] *= size
    y, matrix = base.forward(base.prepare(x)).double(), base.dense().double()
    exact = x.double() @ matrix.T
    # The smallest scale is that of a largest value of 1e-20, so that no scale is zero.
    bound = 1.0001 * STEP * most(x, 1).clamp_min(1e-20) * matrix.abs().sum(1) + 1e-6 * exact.abs()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [5, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_what_is_no_number_gives_none_and_the_others_do(
    bad: float, inputs: int, dtype: torch.dtype, product: Any, rounding: str
) -> None:
    base = Int8(drawn(20, inputs))
    for place in range(inputs):
        x = drawn(3, inputs, seed=1).to(dtype)
        x[1, place] = bad
        y = base.forward(base.prepare(x))
        assert not y[1].isfinite().any(), place
        assert y[0].isfinite().all() and y[2].isfinite().all(), place


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_shows(bad: float, product: Any) -> None:
    weight = drawn(20, 24)
    weight[3, 7] = bad
    base = Int8(weight)
    assert not base.dense()[3].isfinite().any()
    y = base.forward(base.prepare(drawn(2, 24)))
    assert not y[:, 3].isfinite().any() and y[:, :3].isfinite().all()
    assert not base.backward(drawn(2, 20)).isfinite().any()


def test_no_rows_are_no_error(product: Any, rounding: str) -> None:
    base = Int8(drawn(17, 24))
    x = torch.zeros(0, 24, requires_grad=True)
    a, b = drawn(4, 24).requires_grad_(), drawn(17, 4).requires_grad_()
    y = linear(x, Projection(None, drawn(17), a, b, 1.0, base))
    assert y.shape == (0, 17)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 24)
    assert a.grad is not None and not a.grad.any() and b.grad is not None and not b.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_on_it_is_the_layer_on_its_matrix(bias: bool, dtype: torch.dtype, product: Any) -> None:
    base, bias_O = Int8(drawn(96, 128)), drawn(96, seed=3) if bias else None
    x, a, b, upstream = drawn(40, 128, seed=1).to(dtype), drawn(8, 128, seed=4), drawn(96, 8, seed=5), drawn(40, 96, seed=6)
    leaves = [each.requires_grad_() for each in (x, a, b)]
    y = linear(x, Projection(None, bias_O, a, b, 0.5, base))
    found = torch.autograd.grad(y, leaves, upstream.to(dtype))
    wide = [each.detach().double().requires_grad_() for each in leaves]
    exact = wide[0] @ base.dense().double().T + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    exact = exact if bias_O is None else exact + bias_O.double()
    wanted = torch.autograd.grad(exact, wide, upstream.to(dtype).double())
    # A normal row of 128 has a largest value near 2.7: steps of 2.7 / 127, an error of 2.7 / 127 / sqrt(12) = 0.6 %.
    for name, mine, true in zip(("y", "x"), (y.detach(), found[0]), (exact.detach(), wanted[0]), strict=True):
        assert (mine.double() - true).norm() < 0.012 * true.norm(), name
    # What the adapter gets does not go through eight bits.
    for name, mine, true in zip(("a", "b"), found[1:], wanted[1:], strict=True):
        assert (mine.double() - true).norm() < (0.01 if dtype == torch.bfloat16 else 1e-6) * true.norm(), name


def test_the_product_of_a_gpu_gets_the_sizes_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, inputs and outputs in multiples of 8, the first by rows, the second by columns: its checks in torch 2.13."""
    real, seen = torch._int_mm, []

    def checked(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert len(a) > 16 and a.shape[1] % 8 == b.shape[1] % 8 == 0
        assert a.is_contiguous() and b.T.is_contiguous()
        seen.append(a.shape)
        return real(a, b)

    monkeypatch.setattr("pantheraml.kernels.int8.EIGHT_BIT_PRODUCTS", {"others": "pantheraml.kernels.int8:Product"})
    monkeypatch.setattr(torch, "_int_mm", checked)
    for outputs, inputs in SIZES:
        base = Int8(drawn(outputs, inputs))
        for rows in (1, 17, 40):
            base.forward(base.prepare(drawn(rows, inputs)))
            base.forward(base.prepare(drawn(inputs, rows).T))  # rows that do not lie one after the other
            base.backward(drawn(rows, outputs))
    assert len(seen) == 9 * len(SIZES)


def test_it_stays_where_the_weight_is() -> None:
    base = Int8(torch.empty(17, 24, device="meta"))
    x = torch.empty(5, 24, device="meta", dtype=torch.bfloat16)
    y = base.forward(base.prepare(x))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (5, 17))
    grad = base.backward(y)
    assert (grad.device.type, grad.dtype, grad.shape) == ("meta", torch.bfloat16, (5, 24))
    assert base.dense().device.type == "meta"


def held_bytes(base: Any) -> int:
    """Of all tensors of a base and its parts."""
    parts = [value for each in (base, base._forward, base._backward) for value in vars(each).values()]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def test_it_keeps_two_bytes_a_weight_and_no_weight(product: Any) -> None:
    weight = drawn(64, 128)
    gone = weakref.ref(weight)
    base = Int8(weight)
    del weight
    assert gone() is None
    scales = 4 * (64 + 128) * (2 if product is PackedProduct else 1)  # a packed one has a zero for each output, too
    assert held_bytes(base) == 2 * 64 * 128 + scales


def test_a_copy_is_the_same_numbers_without_their_memory(product: Any) -> None:
    base = Int8(drawn(16, 24))
    assert copy.deepcopy(base) is base


def test_backward_keeps_the_input_alone() -> None:
    base, kept = Int8(drawn(96, 128)), []
    x = drawn(64, 128).bfloat16().requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x, Projection(None, base=base))
    assert [each.data_ptr() for each in kept] == [x.data_ptr()]
