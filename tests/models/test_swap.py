from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pantheraml.models.swap import swapped


class Doubled(nn.Linear):
    """Holds the parameters of another linear layer."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, other.out_features, bias=other.bias is not None, device="meta")
        self.weight, self.bias = other.weight, other.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def down_projections(name: str, module: nn.Module) -> nn.Module | None:
    return Doubled(module) if name.endswith("down_proj") and isinstance(module, nn.Linear) else None


def test_swapped_is_undone_and_touches_one_instance(small: Any) -> None:
    model, twin = small("llama"), small("llama")
    ids = torch.tensor([[1, 40, 50, 60]])
    modules, state = dict(model.named_modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        with swapped(model, down_projections) as names:
            assert names == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
            assert not torch.allclose(model(ids).logits, before, atol=1e-3)
            assert twin(ids).logits.equal(before)
            assert model.state_dict().keys() == state.keys()  # a checkpoint does not see it
        assert model(ids).logits.equal(before)
    assert dict(model.named_modules()) == modules
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_an_error_in_the_block_undoes_it_too(small: Any) -> None:
    model = small("llama")
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="in the block"), swapped(model, down_projections):
        raise RuntimeError("in the block")
    assert dict(model.named_modules()) == modules


def test_gradients_flow_into_the_same_parameters(small: Any) -> None:
    model = small("llama")
    with swapped(model, down_projections):
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("other", [nn.Linear(352, 128, bias=False), nn.Linear(352, 128), nn.Identity()], ids=["a copy", "a bias", "none"])
def test_other_parameters_are_refused(other: nn.Module, small: Any) -> None:
    model = small("llama")
    modules = dict(model.named_modules())

    def second(name: str, module: nn.Module) -> nn.Module | None:
        return other if name == "model.layers.1.mlp.down_proj" else down_projections(name, module)

    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj holds other parameters"), swapped(model, second):
        pass
    assert dict(model.named_modules()) == modules  # the first one is back
