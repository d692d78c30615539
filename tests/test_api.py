"""The Python face: a snippet written for Unsloth or TRL runs, and what it cannot mean is refused in words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tests.tiny import chats, losses, quiet, written
from transformers import AutoModelForCausalLM, AutoTokenizer

import pantheraml
from pantheraml import FastLanguageModel, Trainer, TrainingArguments
from pantheraml.errors import DataError, PantheraError, RecipeError, StorageError
from pantheraml.models.tiny import tiny_config

ROWS = chats(32)
FAST = {"eval": {"generate_rows": 2, "max_new_tokens": 4}, "hardware": {"threads": 1}}


def loaded(**lora):
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", max_seq_length=128, dtype="float32", device="cpu")
    return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **lora), tokenizer


def args(folder: Path, **changes) -> TrainingArguments:
    asked = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "recipe": FAST}
    return TrainingArguments(output_dir=str(folder), run_name="api", **{**asked, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, tokenizer, run) of a snippet as people write it."""
    model, tokenizer = loaded()
    trainer = Trainer(model, tokenizer, Dataset.from_list(ROWS), args=args(tmp_path_factory.mktemp("runs")), console=quiet()[0])
    return model, tokenizer, trainer.train()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 40, 80, 120, 60, 200]])).logits.float()


# ---- The three functions -----------------------------------------------------------------------------------------


def test_train_takes_rows_from_memory_and_dotted_settings(tmp_path: Path):
    console, printed = quiet()
    settings = {"optim__steps": 2, "batch": {"size": 4}, "run__folder": str(tmp_path), "run__name": "api", "hardware__threads": 1}
    run = pantheraml.train("tiny:llama", ROWS, console=console, eval=FAST["eval"], **settings)
    assert run.report["train"]["steps"] == 2 and run.report["train"]["batch_size"] == 4
    assert run.recipe.data.train == ("<memory>",) and "step 2/2" in printed()
    assert isinstance(run.chat("what is 1 times 1?", max_new_tokens=3), str)
    assert len(run.generate(["a", "b"], max_new_tokens=3)) == 2
    with pytest.raises(DataError, match="given from memory"):
        (run.folder / "report.json").unlink()
        pantheraml.resume(run.folder, console=console)


def test_train_and_plan_take_files_and_recipes(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", ROWS)
    plan = pantheraml.plan("tiny:llama", path, batch__size=4, hardware__kind="cpu")
    assert (plan.batch_size, plan.device.kind) == (4, "cpu")
    (tmp_path / "recipe.yaml").write_text(f"model: tiny:llama\ndata: {path}\nbatch: {{size: 8}}\n")
    assert pantheraml.plan(str(tmp_path / "recipe.yaml")).batch_size == 8
    assert pantheraml.plan(str(tmp_path / "recipe.yaml"), batch__size=2).batch_size == 2


def test_settings_of_the_model_and_the_data_reach_the_recipe(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", ROWS)
    for data in (path, [path], ROWS):
        plan = pantheraml.plan("tiny:llama", data, model__dtype="float32", model__max_tokens=99, data__packing="off")
        assert (plan.dtype, plan.max_tokens, plan.packing) == ("float32", 99, False)


def test_a_section_in_its_short_form_is_taken_with_a_recipe_file(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(f"model: tiny:llama\ndata: {path}\n")
    assert pantheraml.plan(str(tmp_path / "recipe.yaml"), adapter="full").lr == 2e-5


def test_train_without_data_and_settings_that_nobody_knows_are_refused():
    with pytest.raises(RecipeError, match="train needs data"):
        pantheraml.train("tiny:llama")
    with pytest.raises(RecipeError, match=r"unknown key optim\.learning_rate") as raised:
        pantheraml.plan("tiny:llama", ROWS, optim__learning_rate=1e-4)
    assert "optim.lr" in raised.value.fix


def test_names_that_are_not_there_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'FastVisionModel'"):
        _ = pantheraml.FastVisionModel
    assert {"train", "FastLanguageModel", "Trainer"} <= set(dir(pantheraml))


# ---- FastLanguageModel and Trainer -------------------------------------------------------------------------------


def test_the_snippet_trains_in_place_and_leaves_a_run(trained):
    model, _, run = trained
    assert run.report["train"]["steps"] == 4 and run.report["train"]["batch_size"] == 4
    assert run.report["adapter"] == "lora" and run.recipe.model.max_tokens == 128 and run.recipe.adapter.rank == 4
    assert losses(run.folder)[-1] < losses(run.folder)[0]
    moved = [name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.abs().sum() > 0]
    assert len(moved) == 4 * 7
    from peft import PeftModel

    fresh, _ = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", device="cpu")
    again = PeftModel.from_pretrained(fresh, run.folder / "adapter")
    # The same weights through the same kernels.
    assert torch.equal(logits(again), logits(model))


def test_the_run_of_a_trainer_answers_with_the_model_that_was_trained(trained, tmp_path: Path):
    model, _, run = trained
    assert torch.equal(logits(run.loaded.model), logits(model))
    assert run.export("merged", out=tmp_path / "merged").path.is_dir()


def test_the_merged_model_is_the_trained_one(trained, tmp_path: Path):
    model, tokenizer, _ = trained
    out = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(out)
    # Merged in float32: only the order of additions differs.
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    with pytest.raises(StorageError):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert model.save_pretrained_merged(tmp_path / "merged", tokenizer, overwrite=True) == out


def test_the_gguf_file_holds_the_merged_weights(trained, tmp_path: Path):
    from gguf import GGUFReader

    model, tokenizer, _ = trained
    file = model.save_pretrained_gguf(tmp_path, tokenizer, "f32")
    assert file == tmp_path / "model.f32.gguf"
    merged = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    wanted = AutoModelForCausalLM.from_pretrained(merged).state_dict()["model.layers.0.mlp.down_proj.weight"]
    found = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.0.ffn_down.weight")
    assert torch.equal(torch.from_numpy(found.data.copy()).reshape(wanted.shape), wanted)
    with pytest.raises(PantheraError, match="is there already"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "f32")
    with pytest.raises(RecipeError, match="quantization_method='q2_k' is not known"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "q2_k")


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pantheraml.engines.torch_engine import TorchEngine

    def trainer(folder: Path) -> Trainer:
        model, tokenizer = loaded(lora_dropout=0.1)
        return Trainer(model, processing_class=tokenizer, train_dataset=ROWS, args=args(folder, save_steps=1), console=quiet()[0])

    whole = trainer(tmp_path / "whole").train()
    real = TorchEngine.step

    def step(self, batch, k, lr):
        if k == 2:
            raise KeyboardInterrupt
        return real(self, batch, k, lr)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TorchEngine, "step", step)
        trainer(tmp_path / "cut").train()
    again = trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    assert losses(again.folder) == losses(whole.folder)


def test_evaluation_rows_and_full_training(tmp_path: Path):
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:qwen3", dtype="float32", device="cpu")
    model.requires_grad_(True)
    run = Trainer(
        model, tokenizer, ROWS, ROWS[:3], args(tmp_path, max_steps=2, packing=False, gradient_checkpointing=True), console=quiet()[0]
    ).train()
    assert run.report["adapter"] == "full" and run.report["data"]["eval_rows"] == 3
    plan = json.loads((run.folder / "plan.json").read_text())
    assert (plan["packing"], set(plan["levels"])) == (False, {"all"})
    assert (run.folder / "model").is_dir()


def test_a_model_that_peft_adapted_trains_just_as_well(tmp_path: Path):
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model = get_peft_model(stock, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    _, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", device="cpu")
    run = Trainer(model, tokenizer, ROWS, args=args(tmp_path, learning_rate=2e-2), console=quiet()[0]).train()
    assert run.recipe.adapter.targets == ("q_proj", "v_proj") and losses(run.folder)[-1] < losses(run.folder)[0]


def test_the_words_of_hugging_face_become_a_recipe(tmp_path: Path):
    model, tokenizer = loaded()
    asked = args(
        tmp_path,
        max_steps=20,
        warmup_steps=5,
        num_train_epochs=3,
        lr_scheduler_type="linear",
        assistant_only_loss=False,
        save_total_limit=1,
    )
    recipe = Trainer(model, tokenizer, ROWS, args=asked).recipe
    assert (recipe.optim.steps, recipe.optim.warmup, recipe.optim.schedule) == (20, 0.25, "linear")
    assert (recipe.method.loss_on, recipe.run.keep, recipe.batch.size, recipe.eval.generate_rows) == ("all", 1, 4, 2)
    assert Trainer(model, tokenizer, ROWS, args=args(tmp_path, report_to="none")).recipe.run.reporters == ()


def test_for_training_and_for_inference_switch_the_same_model():
    model, _ = loaded()
    assert FastLanguageModel.for_training(model) is model and model.training
    assert FastLanguageModel.for_inference(model) is model and not model.training and model.config.use_cache


@pytest.mark.parametrize(("asked", "planned"), [("unsloth", "auto"), (True, "on"), (False, "auto")])
def test_checkpointing_of_the_snippet_is_on_in_other_trainers_and_planned_in_ours(asked: bool | str, planned: str, tmp_path: Path):
    model, tokenizer = loaded(use_gradient_checkpointing=asked, bias="none", max_seq_length=None)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is bool(asked)
    assert Trainer(model, tokenizer, ROWS, args=args(tmp_path)).recipe.hardware.checkpointing == planned
    said = Trainer(model, tokenizer, ROWS, args=args(tmp_path, gradient_checkpointing=False)).recipe.hardware.checkpointing
    assert said == "off"


# ---- What is refused ---------------------------------------------------------------------------------------------


def test_an_adapter_argument_that_nothing_reads_is_refused():
    with pytest.raises(RecipeError, match="does not know layers_pattern='x'"):
        loaded(layers_pattern="x")
    with pytest.raises(RecipeError, match="bias='all'"):
        loaded(bias="all")
    with pytest.raises(RecipeError, match="q_prj"):
        loaded(target_modules=["q_prj"])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"model_name": "tiny:nothing"}, "no tiny model of the family 'nothing'"),
        ({"model_name": "tiny:llama", "dtype": "float64"}, "dtype=float64 does not train on"),
        ({"model_name": "tiny:llama", "dtype": "not_a_dtype"}, "dtype=not_a_dtype does not train on"),
        ({"model_name": "tiny:llama", "device": "xpu"}, "xpu"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_loaded_is_refused_in_words(how, said: str):
    with pytest.raises(PantheraError, match=said) as raised:
        FastLanguageModel.from_pretrained(**how)
    assert raised.value.why and raised.value.fix


def test_a_trainer_that_lacks_something_is_refused(tmp_path: Path):
    model, tokenizer = loaded()
    with pytest.raises(RecipeError, match="Trainer needs a tokenizer"):
        Trainer(model, train_dataset=ROWS)
    with pytest.raises(RecipeError, match="Trainer needs a train_dataset"):
        Trainer(model, tokenizer)
    frozen = AutoModelForCausalLM.from_config(tiny_config("llama")).requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter of this model trains") as raised:
        Trainer(frozen, tokenizer, ROWS)
    assert "get_peft_model" in raised.value.fix
    with pytest.raises(RecipeError, match=r"optim\.rl"):
        Trainer(model, tokenizer, ROWS, args=args(tmp_path, recipe={"optim": {"rl": 1}}))


# ---- Other people's trainers -------------------------------------------------------------------------------------


def test_our_model_trains_in_trls_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of ours is in this loop: the model that we hand out is a plain PEFT model."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "1")
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loaded()
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataset_num_proc=None,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.train()
    measured = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(measured) == 6 and all(math.isfinite(loss) for loss in measured) and measured[-1] < measured[0]
    assert trainer.model is model or trainer.model.get_base_model() is model.get_base_model()


# ---- What people pass by habit -----------------------------------------------------------------------------------


def test_paths_may_be_path_objects(tmp_path: Path):
    data = Path(written(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "recipe.yaml").write_text(f"model: tiny:llama\ndata: {data}\n")
    plans = [pantheraml.plan("tiny:llama", data), pantheraml.plan("tiny:llama", [data]), pantheraml.plan(tmp_path / "recipe.yaml")]
    plans.append(pantheraml.plan(tmp_path / "recipe.yaml", run__folder=tmp_path))
    assert len({plan.row_tokens for plan in plans}) == 1


@pytest.mark.parametrize(("data", "said"), [([1, 2], "row 1 of the data is a int"), ({"train": "rows.jsonl"}, "the data is one mapping")])
def test_rows_that_are_no_rows_are_refused_in_words(data, said: str):
    with pytest.raises(DataError, match=said):
        pantheraml.plan("tiny:llama", data)


def test_arguments_that_cannot_be_kept_are_refused_in_words(trained):
    model, tokenizer, _ = trained
    with pytest.raises(RecipeError, match="warmup_steps=5 is given without max_steps"):
        Trainer(model, tokenizer, ROWS, args=TrainingArguments(warmup_steps=5))
    fresh, _ = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", device="cpu")
    with pytest.raises(RecipeError, match=r"adapter\.rank must be a whole number above 0"):
        FastLanguageModel.get_peft_model(fresh, r=0)
    for wrong, said in (
        ({"bf16": True}, "bf16=True, but the model was loaded to compute in float32"),
        ({"fp16": True}, "fp16=True, but the model was loaded to compute in float32"),
        ({"optim": "sgd"}, "optim='sgd' is not known"),
    ):
        with pytest.raises(RecipeError, match=said):
            Trainer(model, tokenizer, ROWS, args=TrainingArguments(**wrong))
    Trainer(model, tokenizer, ROWS, args=TrainingArguments(bf16=False, fp16=False, optim="adamw_torch"))


def test_names_of_optimizers_elsewhere_are_states_here(trained):
    model, tokenizer, _ = trained
    # As transformers.training_args.OptimizerNames and TRL have them.
    for name, states in (
        ("adamw_torch", "float32"),
        ("adamw_torch_fused", "float32"),
        ("adamw_8bit", "8bit"),
        ("adamw_bnb_8bit", "8bit"),
        ("paged_adamw_8bit", "paged"),
    ):
        assert Trainer(model, tokenizer, ROWS, args=TrainingArguments(optim=name)).recipe.optim.states == states
