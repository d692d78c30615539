"""The gate of an MLP in Triton against its definition in float64 and torch's own operations in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.kernels.interpreted import DEVICES, errs_no_more, run
from torch import Tensor
from torch.nn import functional as F

from pantheraml.kernels.gated_triton import BLOCK, gated, gated_backward

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "gelu": (lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "gelu_tanh": (
        lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}
"""Name -> the formula, torch's operation."""


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def check(device: str, gate: Tensor, up: Tensor, activation: str) -> None:
    formula, operation = ACTIVATIONS[activation]
    da = drawn(*gate.shape, dtype=gate.dtype, seed=9)
    a = run(device, gated, gate, up, activation)
    dgate, dup, again = run(device, gated_backward, da, gate, up, activation)
    assert {each.dtype for each in (a, dgate, dup, again)} == {gate.dtype}
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    others = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    wanted, found = formula(leaves[0]) * leaves[1], operation(others[0]) * others[1]
    exact, theirs = torch.autograd.grad(wanted, leaves, da.double()), torch.autograd.grad(found, others, da)
    errs_no_more(a, found, wanted, "a")
    errs_no_more(again, found, wanted, "a, made again")
    errs_no_more(dgate, theirs[0], exact[0], "dgate")
    errs_no_more(dup, theirs[1], exact[1], "dup")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 33), (5, 100), (2, BLOCK + 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(device: str, activation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(device, drawn(*shape, dtype=dtype, seed=0), drawn(*shape, dtype=dtype, seed=1), activation)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_apart(device: str) -> None:
    gate, up = drawn(6, 2 * 33, dtype=torch.bfloat16, seed=0).chunk(2, dim=1)
    check(device, gate, up, "silu")
    da = torch.ones((), dtype=torch.bfloat16).expand(6, 33)
    apart = run(device, gated_backward, da, gate, up, "silu")
    together = run(device, gated_backward, *(each.contiguous() for each in (da, gate, up)), "silu")
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_do_not_overflow(device: str, activation: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]])
    one = torch.ones_like(gate)
    dgate, dup, a = run(device, gated_backward, one, gate, one, activation)
    assert torch.allclose(a, gate.clamp_min(0), atol=1e-7) and torch.equal(a, dup)
    assert torch.allclose(dgate, (gate > 0).float(), atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_are_no_error(device: str) -> None:
    empty = torch.zeros(0, 33)
    assert run(device, gated, empty, empty, "silu").shape == (0, 33)
    assert [each.shape for each in run(device, gated_backward, empty, empty, empty, "silu")] == [(0, 33)] * 3


def test_an_unknown_activation_is_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh, gelu"):
        gated(one, one, "relu")
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh, gelu"):
        gated_backward(one, one, one, "relu")
