"""Linear layers with adapters, norm, gate and residual against their definition in float64 and PEFT's own, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pantheraml.kernels.linear import Norm, Projection, gated_linear, linear, linears

SCALE = 1.75


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One adapted layer on rows of any leading dimensions, in the dtype of x."""
    return linear(x.reshape(-1, x.shape[-1]), Projection(weight, bias, a, b, scale)).view(*x.shape[:-1], len(weight))


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
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(n_in, n_out)).to(dtype), config)
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
        # Held, so that the second has memory of its own.
        both = [lora_linear(x, weight, None, a32, b32, 1.0) for _ in range(2)]
    assert len(both) == 2
    # Two layers on one input: the input once, and a product of [64, 4] each.
    assert sum(size for place, size in kept.items() if place not in parameters) == 64 * 128 * 2 + 2 * 64 * 4 * 2


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    x, weight, bias, a, b = inputs(6)
    y = lora_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), SCALE)
    products: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_", "pantheraml::low_rank_backward"):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        y.sum().backward()
    # b's and that of x @ a.T in one, then a's; the first layer of a model needs none for its input.
    assert products == ["pantheraml.low_rank_backward.default", "aten.mm.default"]
    assert x.grad is None


def test_a_base_that_trains_gets_its_gradient() -> None:
    x, weight, bias, a, b = inputs(7)
    given = [each.clone().requires_grad_() for each in (x, weight, bias, a, b)]
    upstream = torch.randn(7, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(definition(*given), given, upstream)
    ours = torch.autograd.grad(lora_linear(*given, SCALE), given, upstream)
    assert all(relative(mine, true) < 1e-14 for mine, true in zip(ours, exact, strict=True))


class Held:
    """A base whose numbers are not to be had as a matrix: a frozen weight behind the two products."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.prepared = weight, 0

    def prepare(self, x: Tensor) -> Tensor:
        self.prepared += 1
        return x

    def forward(self, prepared: Tensor, add: Tensor | None = None) -> Tensor:
        return prepared @ self.weight.T + (0 if add is None else add)

    def backward(self, grad: Tensor, add: Tensor | None = None) -> Tensor:
        return grad @ self.weight + (0 if add is None else add)


@pytest.mark.parametrize("held", [False, True], ids=["matrix", "held"])
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_group_on_one_input_is_its_layers_one_by_one(held: bool, keep: bool, normed: bool) -> None:
    x, weight, bias, a, b = inputs(9)
    norm_weight = torch.linspace(0.5, 1.5, 24, dtype=torch.float64)
    _, other, _, _, _ = inputs(9, seed=3)
    bases = [Held(weight), Held(other)]
    leaves = [each.clone().requires_grad_() for each in (x, norm_weight, a, b)]
    upstream = [torch.randn(9, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (17, 18, 24)]
    upstream[1] = upstream[1][:, :17]

    def one_by_one(x: Tensor, norm_weight: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (norm_weight + 1.0) if normed else x + 0 * norm_weight
        return [h @ weight.T + bias + SCALE * (h @ a.T) @ b.T, h @ other.T, x]

    def together(x: Tensor, norm_weight: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        projections = [
            Projection(None if held else weight, bias, a, b, SCALE, bases[0] if held else None),
            Projection(None if held else other, base=bases[1] if held else None),
        ]
        norm = Norm(norm_weight, 1e-6, 1.0) if normed else None
        results = list(linears(x, projections, norm=norm, keep=keep, through=True))
        if not normed:
            results[0] = results[0] + 0 * norm_weight.sum()
        return results

    exact, ours = one_by_one(*leaves), together(*leaves)
    assert all(relative(mine.detach(), true.detach()) < 1e-14 for mine, true in zip(ours, exact, strict=True))
    wanted, found = (torch.autograd.grad(each, leaves, upstream) for each in (exact, ours))
    for name, mine, true in zip(("x", "norm", "a", "b"), found, wanted, strict=True):
        assert relative(mine, true) < 1e-13 or not true.any(), name
    if held:
        assert [base.prepared for base in bases] == [1, 0]  # what an input becomes is made once for the group


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("bias", [True, False])
def test_gate_layer_and_residual(factor: float, keep: bool, bias: bool) -> None:
    gate, weight, bias_o, a, b = inputs(8)
    up, residual = gate.flip(0), torch.randn(8, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    leaves = [each.clone().requires_grad_() for each in (gate, up, weight, bias_o, a, b, residual)]
    upstream = torch.randn(8, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def by_definition(gate: Tensor, up: Tensor, weight: Tensor, bias_o: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return residual + factor * definition(torch.sigmoid(gate) * gate * up, weight, bias_o if bias else bias_o * 0, a, b)

    def ours(gate: Tensor, up: Tensor, weight: Tensor, bias_o: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        layer = Projection(weight, bias_o if bias else None, a, b, SCALE)
        y = gated_linear(gate, up, "silu", layer, residual_NO=residual, factor=factor, keep=keep)
        return y if bias else y + 0 * bias_o

    assert relative(ours(*leaves).detach(), by_definition(*leaves).detach()) < 1e-14
    wanted = torch.autograd.grad(by_definition(*leaves), leaves, upstream)
    found = torch.autograd.grad(ours(*leaves), leaves, upstream)
    for name, mine, true in zip(("gate", "up", "weight", "bias", "a", "b", "residual"), found, wanted, strict=True):
        assert relative(mine, true) < 1e-13 or not true.any(), name
