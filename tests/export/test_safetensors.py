"""Stock peft and stock transformers are the judges of what is saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pantheraml.errors import PantheraError, StorageError
from pantheraml.export import safetensors as export
from pantheraml.models.tiny import FAMILIES, tiny_config, tiny_tokenizer

SMALL = {"num_hidden_layers": 2}
IDS = torch.tensor([[1, 40, 80, 120, 60, 200]])


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, **sizes: object) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **{**SMALL, **sizes}))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, **options: object) -> PeftModel:
    """A PEFT model whose adapter does something: with PEFT's zero lora_B every wrong merge would look right."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # peft refuses the state space's out_proj, so the targets are named.
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "in_proj"]
    targets = options.pop("target_modules", projections)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return peft.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folder_is_the_trained_model(tmp_path: Path, family: str, kind: str):
    base = save_base(tmp_path / "base", family)
    model = adapted(base, use_rslora=kind == "rslora", use_dora=kind == "dora")
    expected, without = logits(model), logits(AutoModelForCausalLM.from_pretrained(base))

    report = export.merge(base, export.save_adapter(model, tiny_tokenizer(), tmp_path / "adapter"), tmp_path / "merged")

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.allclose(expected, without, atol=1e-2), "the adapter does nothing, so the test would show nothing"
    torch.testing.assert_close(logits(stock), expected, rtol=1e-3, atol=1e-4)
    assert stock.config.tie_word_embeddings == tiny_config(family).tie_word_embeddings
    assert (stock.get_input_embeddings().weight is stock.get_output_embeddings().weight) == stock.config.tie_word_embeddings
    assert report.dtype == "float32" and report.merge_error < 1e-4 and report.reload_error < 1e-4
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())


def test_bfloat16_base_is_merged_in_float32(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    model = adapted(base)
    report = export.merge(base, export.save_adapter(model, tiny_tokenizer(), tmp_path / "adapter"), tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert stock.dtype == torch.bfloat16 and report.dtype == "bfloat16"
    # The definition: the float32 sum, rounded once. Merging in bfloat16 would round B @ A first.
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert stock.model.layers[0].self_attn.q_proj.weight.equal(exact.to(torch.bfloat16))
    assert 0 < report.reload_error < 0.1


def test_saved_adapter_loads_in_stock_peft(tmp_path: Path):
    base = save_base(tmp_path / "base", "qwen3")
    model = adapted(base)
    export.save_adapter(model, tiny_tokenizer(), tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == tiny_tokenizer().chat_template
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()}.isdisjoint({".bin", ".pt"})


def test_merge_model_leaves_the_model_alone(tmp_path: Path):
    model = adapted(save_base(tmp_path / "base", "llama"))
    before = logits(model)
    export.merge_model(model, tiny_tokenizer(), tmp_path / "merged")
    assert logits(model).equal(before) and isinstance(model, PeftModel)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), before, rtol=1e-3, atol=1e-4)


def test_base_that_exists_only_in_memory(tmp_path: Path):
    model = adapted(save_base(tmp_path / "base", "gemma"))
    model.peft_config["default"].base_model_name_or_path = "tiny:gemma"
    before = logits(model)
    export.merge_model(model, tiny_tokenizer(), tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), before, rtol=1e-3, atol=1e-4)


def test_modules_to_save_replace_and_untie(tmp_path: Path):
    base = save_base(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    model = adapted(base, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    expected = logits(model)
    report = export.merge(base, export.save_adapter(model, tiny_tokenizer(), tmp_path / "adapter"), tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(stock), expected, rtol=1e-3, atol=1e-4)
    assert not stock.config.tie_word_embeddings and "trained apart" in report.notes[0]


def test_full_model_in_another_dtype(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", "gemma2"))
    report = export.save_full(model, tiny_tokenizer(), tmp_path / "full", dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto")
    assert model.dtype == torch.float32 and stock.dtype == torch.bfloat16 and report.dtype == "bfloat16"
    assert (logits(stock) - logits(model)).norm() / logits(model).norm() < 0.05
    with safe_open(tmp_path / "full" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys(), "tied weights are stored once"  # noqa: SIM118


def test_damage_between_saving_and_reading_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", "llama"))
    cast = export._cast

    def damaged(model: object, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        state = cast(model, dtype)
        real = model.save_pretrained
        worse = {**state, "model.layers.1.mlp.down_proj.weight": state["model.layers.1.mlp.down_proj.weight"] * 1.01}
        monkeypatch.setattr(model, "save_pretrained", lambda folder, state_dict: real(folder, state_dict=worse))
        return state

    monkeypatch.setattr(export, "_cast", damaged)
    with pytest.raises(StorageError, match=r"1 of \d+ tensors changed, first model.layers.1.mlp.down_proj.weight"):
        export.save_full(model, tiny_tokenizer(), tmp_path / "full")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_wrong_merge_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from peft.tuners.lora.layer import Linear

    base = save_base(tmp_path / "base", "llama")
    adapter = export.save_adapter(adapted(base), tiny_tokenizer(), tmp_path / "adapter")
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: right(self, name) * 1.1)
    with pytest.raises(StorageError, match=r"relative error of the logits 0\.\d+, at most 0\.0001"):
        export.merge(base, adapter, tmp_path / "merged")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]


def test_quantised_base_is_refused(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama")
    adapter = export.save_adapter(adapted(base), tiny_tokenizer(), tmp_path / "adapter")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "bitsandbytes"},', 1))
    with pytest.raises(PantheraError, match="stored quantised"):
        export.merge(base, adapter, tmp_path / "merged")


def test_folder_with_other_things_is_not_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"), export.atomic_folder(tmp_path / "out"):
        pass
    with export.atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "model").write_text("ours")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_an_interrupted_export(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), export.atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(StorageError, match="No space left"), export.atomic_folder(tmp_path / "out"):
        raise OSError(28, os.strerror(28))
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError) as caught, export.atomic_folder(tmp_path / "file" / "out"):
        pass
    assert "could not be written: File exists" in str(caught.value) and "fix: free space" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"), export.atomic_folder(tmp_path / "out"):
        pass
