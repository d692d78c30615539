"""The names that users know for several chips, on simulated ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny import chats, quiet

from pantheraml.api import FastLanguageModel, PantheraMLDistributedTrainer, Trainer, TrainingArguments
from pantheraml.distributed import (
    MultiTPUConfig,
    cleanup_multi_tpu,
    get_tpu_device,
    get_tpu_memory_info,
    get_tpu_status,
    setup_multi_tpu,
    synchronize_tpu,
)
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.trainer import PantheraMLTPUTrainer


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PANTHERAML_SIMULATE_TPU", "1")
    yield
    cleanup_multi_tpu()


@pytest.mark.slow
def test_the_snippet_trains_on_eight_and_says_that_they_are_simulated(tmp_path: Path) -> None:
    console, _ = quiet()
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", max_seq_length=64, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=4)
    dataset = chats(24)
    config = MultiTPUConfig(num_cores=8)
    assert setup_multi_tpu(config)["devices"] == 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path), run_name="run", max_steps=2, per_device_train_batch_size=8, recipe={"eval": {"generate_rows": 0}}
    )
    trainer = PantheraMLTPUTrainer(
        tpu_config=config, model=model, tokenizer=tokenizer, train_dataset=dataset, args=arguments, console=console
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer.train()
    plan = json.loads((run.folder / "plan.json").read_text())
    assert (plan["mesh"], plan["world_size"], plan["device"]["simulated"]) == ({"fsdp": 8}, 8, True)
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_model_is_loaded_for_the_chips_where_that_is_said(tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", max_seq_length=64, use_tpu=True, auto_device_map=True)
    assert model.device.type == "cpu"  # where it waits
    model = FastLanguageModel.get_peft_model(model, r=4)
    trainer = Trainer(model, tokenizer, chats(8), args=TrainingArguments(output_dir=str(tmp_path)))
    assert (trainer.recipe.hardware.kind, trainer.recipe.hardware.index) == ("tpu", 0)
    with pytest.raises(RecipeError, match="use_multi_gpu=True and use_tpu=True"):
        FastLanguageModel.from_pretrained("tiny:llama", use_tpu=True, use_multi_gpu=True)
    with pytest.raises(RecipeError, match="MultiGPUConfig is not for tpu:0") as refused:
        PantheraMLDistributedTrainer(model, tokenizer, chats(8), args=TrainingArguments(output_dir=str(tmp_path)))
    assert "PantheraMLTPUTrainer" in refused.value.fix


def test_what_is_set_up_is_told() -> None:
    assert get_tpu_status()["ready"] is False
    with pytest.raises(DeviceError, match="no TPU is set up"):
        synchronize_tpu()
    status = setup_multi_tpu(MultiTPUConfig(num_cores=8, tp=2))
    assert (status["ready"], status["devices"], status["mesh"], status["simulated"]) == (True, 8, "fsdp 4 x tp 2", True)
    synchronize_tpu()
    assert get_tpu_device(7).simulated
    assert (get_tpu_memory_info(0)["used_bytes"] or 0) > 0
    with pytest.raises(DeviceError, match="there is no tpu:8"):
        get_tpu_device(8)
    cleanup_multi_tpu()
    assert get_tpu_status()["devices"] == 0


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="does not come to 8 devices"):
        setup_multi_tpu(MultiTPUConfig(num_cores=8, dp=3))
    with pytest.raises(DeviceError, match="16 devices were asked for"):
        setup_multi_tpu(MultiTPUConfig(num_cores=16))
    monkeypatch.delenv("PANTHERAML_SIMULATE_TPU")
    with pytest.raises(DeviceError, match="no TPU answered"):
        setup_multi_tpu(MultiTPUConfig(num_cores=8))
