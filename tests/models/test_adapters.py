"""Adapters beside PEFT's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pantheraml.errors import RecipeError
from pantheraml.models.adapters import attach, linear_names
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import FAMILIES
from pantheraml.recipe.types import LoRA

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"targets": ("q_proj", "v_proj")}], ids=str)
def test_an_adapter_is_pefts(options: dict[str, Any], small: Any) -> None:
    spec = LoRA(rank=9, alpha=6.0, dropout=0.25, **options)
    ours = attach(small("llama"), spec, seed=3)
    config = LoraConfig(
        r=9,
        lora_alpha=6.0,
        lora_dropout=0.25,
        target_modules=list(spec.targets) if "targets" in options else "all-linear",
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    theirs = get_peft_model(small("llama"), config)
    found, wanted = adapter(ours), adapter(theirs)
    assert found.keys() == wanted.keys()
    for name in found:
        # PEFT walks its targets in the order of the model, so the same seed draws the same numbers.
        assert torch.equal(found[name], wanted[name]) and found[name].dtype == torch.float32
        assert ("lora_B" not in name) or not found[name].any()
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / math.sqrt(9) if spec.rslora else 6 / 9)
    assert layer.lora_dropout["default"].p == 0.25
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == set(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_all_of_them_but_the_head(family: str, small: Any) -> None:
    model = small(family)
    # PEFT refuses the output projection of a state space, which a fused kernel reads past any adapter.
    wanted = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"}
    wanted -= {name for name in wanted if name.endswith("mamba.out_proj")}
    shape = shape_of(model, family)
    model = attach(model, LoRA(rank=3), seed=0)
    found = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in adapter(model) if "lora_A" in name}
    assert found == wanted
    assert shape_of(model, family) == shape  # the adapter is not counted
    if family != "falcon_h1":
        assert sum(tensor.numel() for tensor in adapter(model).values()) == shape.lora_parameters(3)


def test_the_seed_decides_and_the_callers_generator_is_left_alone(small: Any) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = adapter(attach(small("llama"), LoRA(), seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    again, other = adapter(attach(small("llama"), LoRA(), seed=1)), adapter(attach(small("llama"), LoRA(), seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_an_adapter_of_a_bfloat16_base_is_float32(small: Any) -> None:
    model = attach(small("llama").bfloat16(), LoRA(), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


@pytest.mark.parametrize("targets", [("nonsense",), ("q_proj", "nonsense")])
def test_a_target_that_is_not_there_is_refused_with_those_that_are(targets: tuple[str, ...], small: Any) -> None:
    model = small("llama")
    with pytest.raises(RecipeError) as caught:
        attach(model, LoRA(targets=targets), seed=0)
    assert caught.value.what == "adapter.targets: this model has no nonsense"
    assert "less than you asked for" in caught.value.why
    assert caught.value.fix.endswith("choose from " + ", ".join(LLAMA)) and linear_names(model) == LLAMA
    assert not adapter(model)  # and nothing was added


def test_a_target_that_is_no_linear_layer_is_refused(small: Any) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.targets=input_layernorm cannot be used on this model") as caught:
        attach(small("llama"), LoRA(targets=("input_layernorm",)), seed=0)
    assert "is not supported" in caught.value.why and "q_proj" in caught.value.fix


def test_gpt2s_own_linear_layers_count() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=100, **ends))
    shape = shape_of(model, "gpt2")
    assert linear_names(model) == ["c_attn", "c_proj", "c_fc"]
    assert shape.linears == ((32, 96), (32, 32), (32, 128), (128, 32)) * 2
    tuned = attach(model, LoRA(rank=2), seed=0)
    assert sum(tensor.numel() for tensor in adapter(tuned).values()) == shape.lora_parameters(2)
