"""The rotation in Triton against its definition in float64 and Hugging Face's formula in the same dtype."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.interpreted import DEVICES, errs_no_more, run
from torch import Tensor

from pantheraml.kernels.rope_triton import rope


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(3, tokens + 3)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return angle.cos(), angle.sin()


def places(pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Where the first and the second of each pair stand."""
    first = 2 * torch.arange(pairs) if interleaved else torch.arange(pairs)
    return first, first + (1 if interleaved else pairs)


def definition(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pair by pair, from the docstring."""
    first, second = places(cos.shape[1], interleaved)
    y = x.clone()
    for pair, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        c, s = cos[:, pair, None], sin[:, pair, None]
        y[:, :, i] = x[:, :, i] * c - x[:, :, j] * s
        y[:, :, j] = x[:, :, j] * c + x[:, :, i] * s
    return y


def stock(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Hugging Face's: x * cos + (x with its pairs turned) * sin, with cos and sin in the dtype of x."""
    first, second = places(cos.shape[1], interleaved)
    turned, wide_cos, wide_sin = torch.zeros_like(x), torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1])
    turned[:, :, first], turned[:, :, second] = -x[:, :, second], x[:, :, first]
    for place in (first, second):
        wide_cos[:, 0, place], wide_sin[:, 0, place] = cos.to(x.dtype), sin.to(x.dtype)
    return x * wide_cos + turned * wide_sin


def check(device: str, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    leaf, other = x.double().requires_grad_(), x.clone().requires_grad_()
    wanted, found = definition(leaf, cos.double(), sin.double(), interleaved), stock(other, cos, sin, interleaved)
    dy = drawn(*x.shape, dtype=x.dtype, seed=5)
    y, dx = run(device, rope, x, cos, sin, interleaved, False), run(device, rope, dy, cos, sin, interleaved, True)
    assert y.dtype == dx.dtype == x.dtype
    errs_no_more(y, found, wanted, "y")
    errs_no_more(dx, torch.autograd.grad(found, other, dy)[0], torch.autograd.grad(wanted, leaf, dy.double())[0], "dx")
    untouched = slice(2 * cos.shape[1], None)
    assert torch.equal(y[:, :, untouched], x[:, :, untouched]) and torch.equal(dx[:, :, untouched], dy[:, :, untouched])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "pairs"), [((1, 1, 96), 48), ((5, 3, 100), 50), ((4, 5, 100), 12), ((3, 9, 6), 1), ((2, 40, 256), 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(device: str, shape: tuple[int, int, int], pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    check(device, drawn(*shape, dtype=dtype, seed=0), *angles(shape[0], pairs), interleaved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_heads_and_angles_may_lie_apart(device: str, interleaved: bool) -> None:
    heads_first = drawn(3, 6, 2 * 24, dtype=torch.bfloat16, seed=0)
    cos, sin = (torch.cat((each, each), dim=1) for each in angles(6, 12))  # as Hugging Face keeps them, twice
    check(device, heads_first.transpose(0, 1)[:, :, 24:], cos[:, :12], sin[:, 12:], interleaved)


@pytest.mark.parametrize("device", DEVICES)
def test_there_and_back(device: str) -> None:
    x, (cos, sin) = drawn(5, 3, 32, dtype=torch.float32, seed=0), angles(5, 16)
    back = run(device, rope, run(device, rope, x, cos, sin, False, False), cos, sin, False, True)
    assert torch.allclose(back, x, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_are_no_error(device: str) -> None:
    assert run(device, rope, torch.zeros(0, 3, 8), torch.zeros(0, 4), torch.zeros(0, 4), False, False).shape == (0, 3, 8)


def test_more_pairs_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match="5 pairs do not fit into 8 features"):
        rope(torch.zeros(1, 1, 8), torch.zeros(1, 5), torch.zeros(1, 5), False, False)
