"""Adapted layers under the kernel: a model is as it was under PEFT, and only what is plain is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pantheraml.models.adapters import attach
from pantheraml.models.lora import LoraLinear, fused_lora, stock_layers
from pantheraml.models.tiny import FAMILIES
from pantheraml.recipe.types import LoRA

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 41, 51, 61, 71, 81]])


def adapted(small: Any, family: str, **spec: Any) -> Any:
    model = attach(small(family), LoRA(rank=4, **spec), seed=7)
    with torch.no_grad():  # a new adapter is zero, and what it adds would go unseen
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def loss_and_gradients(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_are_those_under_peft(small: Any, family: str) -> None:
    model = adapted(small, family)
    loss, exact = loss_and_gradients(model, torch.float32)
    with fused_lora(model) as names:
        assert names and any(isinstance(layer, LoraLinear) for layer in model.modules())
        ours, gradients = loss_and_gradients(model, torch.float32)
    assert not any(isinstance(layer, LoraLinear) for layer in model.modules())
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)
    assert gradients.keys() == exact.keys()
    largest = max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in gradients.items():
        assert float((gradient - exact[name]).norm()) <= 1e-4 * float(exact[name].norm()) + 1e-6 * largest, name


def test_checkpointing_changes_nothing(small: Any) -> None:
    model = adapted(small, "llama")
    with fused_lora(model):
        loss, plain = loss_and_gradients(model, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fused_lora(model):
        again, gradients = loss_and_gradients(model, torch.bfloat16)
    assert torch.equal(loss, again) and all(torch.equal(plain[name], gradients[name]) for name in plain)


def test_parameters_and_their_names_stay(small: Any) -> None:
    model = adapted(small, "llama")
    before = dict(model.named_parameters())
    with fused_lora(model):
        during = dict(model.named_parameters())
        assert during.keys() == before.keys() and all(during[name] is before[name] for name in before)


@pytest.mark.parametrize("spec", [{"dropout": 0.1}, {"dora": True}])
def test_what_the_kernel_cannot_do_keeps_its_own_forward(small: Any, spec: dict[str, Any]) -> None:
    model = adapted(small, "llama", **spec)
    with fused_lora(model) as names:
        assert names == ()
    assert stock_layers(model) == sum(name.endswith("lora_A.default") for name, _ in model.named_modules())
    assert stock_layers(adapted(small, "llama")) == 0


def test_several_adapters_and_a_merged_one_are_left_alone(small: Any) -> None:
    model = adapted(small, "llama")
    model.add_adapter("second", model.peft_config["default"])
    with fused_lora(model) as names:
        assert names == ()
    model = adapted(small, "llama")
    model.merge_adapter()
    with fused_lora(model) as names:
        assert names == ()


def test_rslora_has_its_own_scale(small: Any) -> None:
    model = adapted(small, "llama", rslora=True)
    loss, _ = loss_and_gradients(model, torch.float32)
    with fused_lora(model):
        ours, _ = loss_and_gradients(model, torch.float32)
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)
