"""Four bits of bitsandbytes behind the kernels: products are those of the matrix that it reads back, in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pantheraml.kernels.linear import Projection, linear, linears
from pantheraml.kernels.nf4 import Nf4

pytest.importorskip("bitsandbytes")

# The sixteen values of NF4: arXiv 2305.14314, appendix E.
NEGATIVE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833234]
NEGATIVE += [-0.09105003625154495]
POSITIVE = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434]
POSITIVE += [0.5626170039176941, 0.7229568362236023, 1.0]
VALUES = torch.tensor([*NEGATIVE, 0.0, *POSITIVE], dtype=torch.float64)
BLOCK = 64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(weight: Tensor, *, double: bool = True) -> Any:
    """The weight as transformers loads it with model.load_in_4bit."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (96, 80), (64, 33)], ids=str)
def test_the_matrix_is_the_nearest_of_sixteen_values_in_each_block(shape: tuple[int, int], double: bool) -> None:
    weight = drawn(*shape)
    dense = Nf4(held(weight, double=double)).dense().double()
    assert dense.shape == shape
    blocks = weight.double().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = VALUES[(blocks[..., None] / largest[..., None] - VALUES).abs().argmin(-1)] * largest
    # A scale that is itself held in eight bits is off by up to half of its 256 steps.
    tolerance = 0.02 if double else 1e-6
    assert (dense.reshape(-1, BLOCK) - nearest).norm() < tolerance * nearest.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_products_are_those_of_the_matrix(rows: int, dtype: torch.dtype) -> None:
    base = Nf4(held(drawn(48, 128).to(dtype)))
    dense = base.dense()
    assert dense.dtype == dtype and not dense.requires_grad
    x, grad = drawn(rows, 128, seed=1).to(dtype), drawn(rows, 48, seed=2).to(dtype)
    # Nothing is rounded on the way: it is the product of the same dtype.
    torch.testing.assert_close(base.forward(base.prepare(x)), x @ dense.T, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(base.backward(grad), grad @ dense, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_what_is_added_is_added_and_left_as_it_was() -> None:
    base, x, grad = Nf4(held(drawn(48, 128))), drawn(7, 128, seed=1), drawn(7, 48, seed=2)
    forward, backward = drawn(7, 48, seed=3), drawn(7, 128, seed=4)
    before = (forward.clone(), backward.clone())
    torch.testing.assert_close(base.forward(base.prepare(x), forward), base.forward(base.prepare(x)) + forward)
    torch.testing.assert_close(base.backward(grad, backward), base.backward(grad) + backward)
    assert before[0].equal(forward) and before[1].equal(backward)


def test_rows_in_another_dtype_than_the_weights_keep_it() -> None:
    base = Nf4(held(drawn(48, 128).bfloat16()))
    x = drawn(3, 128, seed=1)
    assert base.forward(base.prepare(x)).dtype == torch.float32
    assert base.backward(drawn(3, 48)).dtype == torch.float32


def test_a_layer_on_it_is_the_layer_on_its_matrix() -> None:
    base, bias = Nf4(held(drawn(48, 128))), drawn(48, seed=3)
    x, a, b, upstream = drawn(9, 128, seed=1), drawn(4, 128, seed=4), drawn(48, 4, seed=5), drawn(9, 48, seed=6)
    leaves = [each.requires_grad_() for each in (x, a, b)]
    y = linear(x, Projection(None, bias, a, b, 0.5, base))
    found = torch.autograd.grad(y, leaves, upstream)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    exact = wide[0] @ base.dense().double().T + bias.double() + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    wanted = torch.autograd.grad(exact, wide, upstream.double())
    for name, mine, true in zip(("y", "x", "a", "b"), (y.detach(), *found), (exact.detach(), *wanted), strict=True):
        assert (mine.double() - true).norm() < 1e-6 * true.norm(), name


def test_a_row_with_what_is_no_number_gives_none() -> None:
    base, x = Nf4(held(drawn(48, 128))), drawn(3, 128)
    x[1, 5] = torch.nan
    y = base.forward(base.prepare(x))
    assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every matrix that is made whole."""
    import bitsandbytes.functional

    real, seen = bitsandbytes.functional.dequantize_4bit, []

    def counted(*args: Any, **rest: Any) -> Tensor:
        seen.append(real(*args, **rest))
        return seen[-1]

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", counted)
    return seen


def test_where_it_is_kept_the_matrix_is_made_once_for_each_dtype_in_use(made: list[Tensor]) -> None:
    weight = held(drawn(48, 128).bfloat16())
    kept, plain = Nf4(weight, keep=True), Nf4(weight)
    x, grad = drawn(5, 128).bfloat16(), drawn(5, 48).bfloat16()
    for _ in range(3):
        assert kept.forward(kept.prepare(x)).equal(plain.forward(plain.prepare(x)))
        assert kept.backward(grad).equal(plain.backward(grad))
    assert len(made) == 1 + 6
    assert kept.forward(x.float()).dtype == torch.float32 and len(made) == 8  # rows of another dtype are not what was kept
    assert kept.forward(x.float()).equal(plain.forward(x.float())) and len(made) == 9


def test_the_matrix_is_made_once_a_use_and_not_kept(made: list[Tensor]) -> None:
    bases = [Nf4(held(drawn(48, 128, seed=seed))) for seed in (0, 1)]
    x, kept = drawn(5, 128).requires_grad_(), set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = linears(x, [Projection(None, base=base) for base in bases])
    assert len(made) == 2 and kept == {x.data_ptr()}
    sum(y.sum() for y in results).backward()
    assert len(made) == 4
