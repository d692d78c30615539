"""Products by oneDNN: the same numbers, in the place of plain float32 layers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pantheraml.models.adapters import attach
from pantheraml.models.dense import DenseLinear, _available, dense_products
from pantheraml.recipe.types import LoRA

pytestmark = pytest.mark.skipif(not _available(), reason="this torch has no oneDNN product of float32 matrices as they lie")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 48)])
def test_a_product_is_that_of_its_definition(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(48, 33, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        torch.testing.assert_close(DenseLinear(layer)(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_with_gradients_it_is_torchs_own() -> None:
    layer = nn.Linear(4, 3)
    DenseLinear(layer)(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_layers_are_exchanged_for_the_block_alone(small: Any) -> None:
    model = attach(small("llama"), LoRA(rank=2), seed=0)
    before = dict(model.named_modules())
    with dense_products(model) as names:
        assert any(name.endswith("q_proj.base_layer") for name in names) and any(name.endswith("lm_head") for name in names)
        assert {name for name, _ in model.named_parameters()} == {
            f"{name}.{own}" for name, module in before.items() for own, _ in module.named_parameters(recurse=False)
        }
    assert dict(model.named_modules()) == before


def test_layers_that_are_more_than_a_matrix_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("plain", "hooked", "halves", "replaced", "turned")} | {"own": Own(4, 4)})
    model["hooked"].register_forward_hook(lambda *_: None)
    model["halves"].bfloat16()
    model["replaced"].forward = lambda x: x
    model["turned"].weight = nn.Parameter(model["turned"].weight.T)
    with dense_products(model) as names:
        assert names == ("plain",)
