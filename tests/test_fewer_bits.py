"""A base in eight or four bits through the public faces: it trains, its adapter is of use anywhere, and what cannot be is said early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.tiny import chats, losses, quiet
from transformers import AutoModelForCausalLM

import pantheraml
from pantheraml import FastLanguageModel, Trainer, TrainingArguments
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.cpu import multiplies_int8
from pantheraml.models.quantize import EightBitLinear, held_in_eight_bits

ROWS = chats(24)
FAST = {"eval": {"generate_rows": 2, "max_new_tokens": 4}, "hardware": {"threads": 1}}
needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no products of eight-bit whole numbers")


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {
        "model__dtype": "bfloat16",
        "batch": {"size": 4},
        "adapter": {"rank": 4, "alpha": 8},
        "optim": {"steps": 10, "lr": 3e-3},
        "run": {"folder": str(folder), "name": "run", "log_every": 1},
        "hardware": {"kind": "cpu", "threads": 1},
        "eval": FAST["eval"],
        **more,
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 40, 80, 120, 60, 200]])).logits.float()


@pytest.mark.parametrize("field", [pytest.param("load_in_8bit", marks=needs_int8), "load_in_4bit"])
def test_a_recipe_trains_on_it_and_its_adapter_merges_into_the_base(field: str, tmp_path: Path) -> None:
    if field == "load_in_4bit":
        pytest.importorskip("bitsandbytes")
    run = pantheraml.train("tiny:llama", ROWS, console=quiet()[0], **settings(tmp_path, **{f"model__{field}": True}))
    plain = pantheraml.train("tiny:llama", ROWS, console=quiet()[0], **settings(tmp_path / "plain"))
    found, wanted = losses(run.folder), losses(plain.folder)
    assert found[-1] < 0.9 * found[0]
    # Random weights decide little, so that rounding them moves the loss by less than a hundredth.
    assert found == pytest.approx(wanted, rel=0.02)
    assert found != wanted
    merged = run.export("merged")
    base = AutoModelForCausalLM.from_pretrained(run.folder / "base", dtype=torch.float32)
    exact = logits(PeftModel.from_pretrained(base, str(run.folder / "adapter")))
    stock = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)
    assert (logits(stock) - exact).norm() < 1e-2 * exact.norm()  # the base as it was, not as it was held


@needs_int8
def test_a_model_from_pretrained_is_held_so_as_soon_as_it_has_an_adapter(tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", load_in_8bit=True, dtype="bfloat16", device="cpu")
    assert not held_in_eight_bits(model)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    assert sum(isinstance(each, EightBitLinear) for each in model.modules()) == 28
    args = TrainingArguments(output_dir=str(tmp_path), run_name="api", max_steps=8, learning_rate=1e-2, logging_steps=1, recipe=FAST)
    run = Trainer(model, tokenizer, ROWS, args=args, console=quiet()[0]).train()
    assert run.recipe.model.load_in_8bit and run.report["plan"]
    found = losses(run.folder)
    assert found[-1] < 0.9 * found[0]
    # What is planned is the model that it is, though most of its weights are no parameters now.
    assert run.report["train"]["parameters"] == sum(each.numel() for each in plain_llama().parameters())
    # The base that is kept beside the adapter is whole, and is the one that was trained on.
    base = AutoModelForCausalLM.from_pretrained(run.folder / "base", dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(base, str(run.folder / "adapter"))
    mine = logits(model)
    assert (logits(again) - mine).norm() < 0.05 * mine.norm()
    assert run.chat("what is 1 times 1?", max_new_tokens=3) is not None


def plain_llama() -> torch.nn.Module:
    return FastLanguageModel.from_pretrained("tiny:llama", device="cpu")[0]


def test_what_cannot_be_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(DeviceError) as caught:
        FastLanguageModel.from_pretrained("no/such-model", load_in_fp8=True, device="cpu")
    assert "model.load_in_fp8=true, but cpu:0" in caught.value.what and "compute capability 8.9" in caught.value.why
    with pytest.raises(RecipeError, match=r"model\.load_in_4bit and model\.load_in_8bit are asked for at once"):
        FastLanguageModel.from_pretrained("no/such-model", load_in_4bit=True, load_in_8bit=True, device="cpu")


def test_a_tiny_model_is_not_left_whole_in_silence() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(RecipeError) as caught:
        FastLanguageModel.from_pretrained("tiny:llama", load_in_4bit=True, device="cpu")
    assert caught.value.what == "tiny:llama cannot be loaded in 4 bits" and "pantheraml.train" in caught.value.fix


@needs_int8
def test_a_model_held_so_without_an_adapter_does_not_train(tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", load_in_8bit=True, device="cpu")
    with pytest.raises(RecipeError, match=r"model\.load_in_8bit freezes the base, so adapter\.kind must be lora"):
        Trainer(model, tokenizer, ROWS, args=TrainingArguments(output_dir=str(tmp_path), recipe=FAST))


@needs_int8
def test_an_adapter_that_peft_made_is_trained_on_a_base_held_so_as_well(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", load_in_8bit=True, device="cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments(output_dir=str(tmp_path), run_name="api", max_steps=2, recipe=FAST)
    Trainer(adapted, tokenizer, ROWS, args=args, console=quiet()[0]).train()
    assert sum(isinstance(each, EightBitLinear) for each in adapted.modules()) == 28
