"""The adapted linear layer against its definition in float64 and against PEFT's own, and every claim of its docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pantheraml.kernels.lora_linear import lora_linear

SCALE = 1.75


def inputs(*leading: int, n_in: int = 24, n_out: int = 17, rank: int = 5, bias: bool = True, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, a, b in float64; about 1 in size."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((*leading, n_in), (n_out, n_in), (n_out,), (rank, n_in), (n_out, rank))
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    return made if bias else [*made[:2], torch.zeros(0), *made[3:]]


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The formula of the docstring, sum by sum."""
    y = torch.einsum("...i,oi->...o", x, weight) + SCALE * torch.einsum("...i,ri,or->...o", x, a, b)
    return y if bias is None else y + bias


def values_and_gradients(
    compute: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, upstream: Tensor
) -> list[Tensor]:
    x, a, b = (each.detach().clone().requires_grad_() for each in (x, a, b))
    y = compute(x, weight, bias, a, b)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), upstream.to(y.dtype))]


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("leading", [(1,), (7,), (2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_definition(leading: tuple[int, ...], bias: bool) -> None:
    x, weight, b_o, a, b = inputs(*leading, bias=bias)
    chosen = b_o if bias else None
    upstream = torch.randn(*leading, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = values_and_gradients(definition, x, weight, chosen, a, b, upstream)
    ours = values_and_gradients(lambda *all: lora_linear(*all, SCALE), x, weight, chosen, a, b, upstream)
    for name, mine, true in zip(("y", "x", "a", "b"), ours, exact, strict=True):
        assert mine.shape == true.shape and relative(mine, true) < 1e-14, name


def test_no_tokens_are_no_error() -> None:
    x, weight, bias, a, b = inputs(0)
    ours = values_and_gradients(lambda *all: lora_linear(*all, SCALE), x, weight, bias, a, b, torch.zeros(0, 17))
    assert [tuple(each.shape) for each in ours] == [(0, 17), (0, 24), (5, 24), (17, 5)]
    assert not ours[2].any() and not ours[3].any()


def peft_layer(n_in: int, n_out: int, rank: int, dtype: torch.dtype) -> Any:
    """One linear layer under PEFT, as `attach` makes it."""
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"])  # pyright: ignore[reportArgumentType]
    model = get_peft_model(nn.Sequential(nn.Linear(n_in, n_out)).to(dtype), config)  # pyright: ignore[reportArgumentType]
    return model.base_model.model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_errs_no_more_than_pefts_layer_in_the_same_dtype(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = inputs(300, n_in=96, n_out=80, rank=8)
    x, weight, bias = (each.to(dtype).double() for each in (x, weight, bias))  # what both are given is exact
    upstream = torch.randn(300, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = values_and_gradients(definition, x, weight, bias, a.float().double(), b.float().double(), upstream.double())
    layer = peft_layer(96, 80, 8, dtype)
    with torch.no_grad():
        for parameter, value in zip((layer.base_layer.weight, layer.base_layer.bias), (weight, bias), strict=True):
            parameter.copy_(value)

    def stock(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        del layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        return layer(x)

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, a, b, SCALE)

    given = (x.to(dtype), weight.to(dtype), bias.to(dtype), a.float(), b.float(), upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = values_and_gradients(fused, *given), values_and_gradients(stock, *given)
    for name, mine, other, true in zip(("y", "x", "a", "b"), ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype, name
        assert relative(mine, true) <= 1.1 * relative(other, true) + 1e-7, name


def test_what_is_kept_for_backward_is_shared_input_and_the_skinny_product() -> None:
    x, weight, _, a, b = (each.to(torch.bfloat16) for each in inputs(64, n_in=128, n_out=96, rank=4))
    x.requires_grad_()
    a32, b32 = a.float().requires_grad_(), b.float().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    parameters = {each.data_ptr() for each in (weight, a32, b32)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        lora_linear(x, weight, None, a32, b32, 1.0)
        lora_linear(x, weight, None, a32, b32, 1.0)
    # Two layers on one input: the input once, and a product of [64, 4] each.
    assert sum(size for place, size in kept.items() if place not in parameters) == 64 * 128 * 2 + 2 * 64 * 4 * 2


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    x, weight, bias, a, b = inputs(6)
    y = lora_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), SCALE)
    products: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        y.sum().backward()
    assert len(products) == 3  # for a two, for b one; the first layer of a model needs none for its input
    assert x.grad is None


def test_a_base_that_trains_is_refused() -> None:
    x, weight, bias, a, b = inputs(2)
    with pytest.raises(ValueError, match="must be frozen"):
        lora_linear(x, weight.requires_grad_(), bias, a, b, SCALE)
