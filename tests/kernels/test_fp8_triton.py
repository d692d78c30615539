"""Rows rounded to eight-bit floats in Triton: the bits that torch comes to."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.interpreted import DEVICES, run
from torch import Tensor

from pantheraml.kernels import fp8
from pantheraml.kernels.fp8_triton import BLOCK, rounded


def drawn(*shape: int) -> Tensor:
    """Rows of very different sizes."""
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return wide * torch.logspace(-4, 4, shape[0], dtype=torch.float64)[:, None]


def check(device: str, x: Tensor) -> None:
    q, scale = run(device, rounded, x)
    exact_q, exact_scale = fp8.rounded(x)
    assert q.dtype == fp8.E4M3 and scale.dtype == torch.float32 and q.is_contiguous()
    torch.testing.assert_close(scale, exact_scale, rtol=2e-7, atol=0)
    # A quotient in the middle between two of the 256 values may go either way, where a GPU's division is off by its last bit.
    other = q.view(torch.uint8) != exact_q.view(torch.uint8)
    assert other.float().mean() <= (0 if device == "interpreter" else 1e-3)
    assert ((q.float() - exact_q.float()).abs() <= exact_q.float().abs() / 8).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (3, BLOCK + 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_torch(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(device, drawn(*shape).clamp(-6e4, 6e4).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_in_any_way(device: str) -> None:
    check(device, drawn(32, 48).bfloat16().T)
    check(device, drawn(6, 96).bfloat16()[:, ::2])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_and_zeros(device: str) -> None:
    q, scale = run(device, rounded, torch.zeros(0, 16))
    assert q.shape == (0, 16) and scale.shape == (0, 1)
    q, scale = run(device, rounded, torch.zeros(2, 16))
    assert not q.float().any() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_what_is_no_number_gives_none_and_the_others_do(device: str, value: float) -> None:
    x = torch.ones(3, 16)
    x[1, 3] = value
    q, scale = run(device, rounded, x)
    assert not torch.isfinite(q.float() * scale)[1, 3]
    assert torch.equal(q[0], q[2]) and torch.isfinite(q[0].float() * scale[0]).all()
