"""Runs from recipe to report, on small models: what they leave, that they go on bit by bit, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from tests.tiny import chats, losses, quiet, tiny_recipe, written
from transformers import AutoModelForCausalLM

from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import DataError, DivergedError, RecipeError, StorageError
from pantheraml.models.decoder import Decoder
from pantheraml.models.tiny import tiny_config, tiny_tokenizer
from pantheraml.recipe.load import dump_recipe, recipe_from
from pantheraml.trainer import report
from pantheraml.trainer import survey as survey_module
from pantheraml.trainer.evaluate import evaluate
from pantheraml.trainer.folder import open_folder
from pantheraml.trainer.run import train
from pantheraml.trainer.runs import Run, list_runs
from pantheraml.trainer.survey import survey

ROWS = chats(40)
DROPOUT = {"kind": "lora", "rank": 4, "dropout": 0.2}
# Rows share a packed row or stand alone, and micro-batches are cut elsewhere: float32 sums in another order.
SAME = 1e-5


def made(recipe, rows=None, **how) -> tuple[Run, str]:
    """The run, and what was printed."""
    console, printed = quiet()
    return train(recipe, rows=rows, console=console, **how), printed()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("data") / "faq.jsonl", ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> tuple[Run, str]:
    """A run that nothing interrupted; dropout, because that is where a lost random state would show."""
    folder = tmp_path_factory.mktemp("whole")
    return made(tiny_recipe(folder, data, adapter=DROPOUT, eval={"prompts": ["and then?"]}))


class Killed(BaseException):
    """Ends a run in the middle of a step, as far as one process can do that to itself."""


def killed_at(k: int, monkeypatch: pytest.MonkeyPatch, recipe, **how) -> None:
    """Start a run, and end it in the middle of step k, from 0."""
    real = TorchEngine.step

    def step(self, batch, at, lr):
        if at == k:
            raise Killed
        return real(self, batch, at, lr)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "step", step)
        with pytest.raises(Killed):
            made(recipe, **how)


# ---- What a run leaves -------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_was_asked_planned_measured_and_learned(whole):
    run, printed = whole
    names = {file.name for file in run.folder.iterdir()}
    files = {"recipe.yaml", "plan.json", "before.json", "metrics.jsonl", "report.json", "report.md", "loss.png", ".lock"}
    assert names == files | {"base", "adapter", "checkpoints"}
    assert sorted(file.name for file in (run.folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert run.recipe.run.name == "run" and run.recipe.adapter.dropout == 0.2
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "Data: messages" in printed and "step 6/6  loss" in printed and "step 3/6  held-out loss" in printed
    assert json.loads((run.folder / "plan.json").read_text())["dtype"] == "float32"


def test_the_report_says_what_metrics_and_data_say(whole):
    run, _ = whole
    report = run.report
    measured = losses(run.folder, "eval_loss")
    assert (report["run"], report["model"], report["method"], report["adapter"]) == ("run", "tiny:llama", "sft", "lora")
    assert report["data"] == {"format": "messages", "train_rows": 36, "eval_rows": 4, "bad_rows": 0, "in_both": 0}
    train = report["train"]
    assert (train["steps"], train["kept_step"], train["batch_size"]) == (6, 6, 4)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert train["tokens"] == sum(line.get("tokens", 0) for line in lines)
    assert train["tokens_per_s"] == pytest.approx(train["tokens"] / train["train_s"])
    # rank 4 on the seven linear layers of four blocks: 4 * (in + out) each.
    shapes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 352), (128, 352), (352, 128)]
    assert train["trainable_parameters"] == 4 * sum(4 * (n_in + n_out) for n_in, n_out in shapes)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "base")
    assert train["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["eval"]["rows"] == 2 and report["eval"]["loss_before"] == measured[0]
    assert report["eval"]["loss_after"] == pytest.approx(measured[-1], rel=1e-6) and measured[-1] < measured[0]
    assert [sample["expected"] is None for sample in report["samples"]] == [False, False, True]
    assert set(report["plan"]) == {"memory_bytes", "tokens_per_s", "train_s", "usd"}
    page = (run.folder / "report.md").read_text()
    assert f"| held-out loss | {measured[0]:.4f} | {measured[-1]:.4f} |" in page and "| packing | on |" in page


def test_the_adapter_loads_with_stock_peft_and_is_what_the_last_checkpoint_holds(whole):
    run, _ = whole
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.folder / "base"), run.folder / "adapter")
    saved = load_file(run.folder / "checkpoints/step-00000006/tensors.safetensors")
    weights = {name.removeprefix("weight/"): tensor for name, tensor in saved.items() if name.startswith("weight/")}
    loaded = dict(model.named_parameters())
    assert weights and all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert (run.folder / "adapter/chat_template.jinja").exists()


def test_a_run_that_has_ended_is_listed_and_not_trained_again(whole):
    run, _ = whole
    before = (run.folder / "report.json").read_bytes()
    again, printed = made(run.recipe, resume=True)
    assert "has ended already" in printed and again.folder == run.folder
    assert (run.folder / "report.json").read_bytes() == before
    assert [each.folder for each in list_runs(run.folder.parent)] == [run.folder]


# ---- Going on ----------------------------------------------------------------------------------------------------

# One process forks a child for each kill, since importing torch takes longer than the runs.
KILLS = """
import os, signal, sys
from pathlib import Path
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.recipe.load import load_recipe
from pantheraml.trainer import checkpoint, run
from tests.tiny import quiet

def kill_in(where, at):
    def deadly(real, is_it):
        def call(*args, **kwargs):
            if is_it(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    match where:
        case "step":
            TorchEngine.step = deadly(TorchEngine.step, lambda engine, batch, k, lr: k == at)
        case "save":  # the files are there, the name is not yet
            saving = []
            checkpoint.Checkpoints.save = (lambda real: lambda self, step, *a, **k: (saving.append(step), real(self, step, *a, **k))[1])(
                checkpoint.Checkpoints.save)
            Path.rename = deadly(Path.rename, lambda path, out: saving[-1:] == [at] and path.name.startswith(".unfinished"))
        case "end":  # trained, nothing taken away yet
            run._save = deadly(run._save, lambda *all: True)

recipe = load_recipe(Path(sys.argv[1]))
for word in sys.argv[2:]:
    where, _, at = word.partition(":")
    child = os.fork()
    if not child:
        kill_in(where, int(at or 0))
        run.train(recipe, resume=True, console=quiet()[0])
        os._exit(1)
    print(word, os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_run_killed_three_times_ends_bit_for_bit_like_one_that_was_not(whole, tmp_path: Path):
    run, _ = whole
    recipe = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"folder": str(tmp_path)})})
    (tmp_path / "asked.yaml").write_text(dump_recipe(recipe))
    words = ["step:3", "save:4", "end"]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "asked.yaml"), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines() == [f"{word} {signal.SIGKILL.value}" for word in words], done.stderr
    assert (tmp_path / "run/recipe.yaml").exists() and not (tmp_path / "run/report.json").exists()

    again, printed = made(recipe, resume=True)
    assert "Going on after step 6 of 6" in printed
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/tensors.safetensors", "base/model.safetensors"):
        assert (again.folder / file).read_bytes() == (run.folder / file).read_bytes(), file
    for key in ("loss", "grad_norm", "lr", "eval_loss"):
        assert losses(again.folder, key) == losses(run.folder, key), key
    for part in ("eval", "samples"):
        assert again.report[part] == run.report[part]
    assert again.report["train"]["tokens"] == run.report["train"]["tokens"]
    assert not [file for file in again.folder.rglob(".*") if file.name != ".lock"]


STOP = """
import os, signal, sys
from pantheraml.cli import main
from pantheraml.engines.torch_engine import TorchEngine
real = TorchEngine.step
def step(self, batch, k, lr):
    if k == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, batch, k, lr)
TorchEngine.step = step
sys.argv = ["pantheraml", "train", sys.argv[1]]
main()
"""


def test_sigterm_exits_75_with_a_checkpoint_and_no_secret_of_the_environment_is_kept(whole, tmp_path: Path):
    run, _ = whole
    recipe = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"folder": str(tmp_path)})})
    (tmp_path / "asked.yaml").write_text(dump_recipe(recipe))
    secrets = {"HF_TOKEN": "hf_" + "Q7zJ" * 8, "WANDB_API_KEY": "0123456789abcdef" * 2, "AWS_SECRET_ACCESS_KEY": "w9Kx" * 10}
    done = subprocess.run(
        [sys.executable, "-c", STOP, str(tmp_path / "asked.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **secrets},
    )
    assert done.returncode == 75, done.stderr
    assert "error: stopped after step 3 of 6, with a checkpoint saved" in done.stderr and "Traceback" not in done.stderr
    again, printed = made(recipe, resume=True)
    assert "Going on after step 3 of 6" in printed
    tensors = "checkpoints/step-00000006/tensors.safetensors"
    assert (again.folder / tensors).read_bytes() == (run.folder / tensors).read_bytes()
    files = [file for file in again.folder.rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        assert not [name for name, value in secrets.items() if value.encode() in file.read_bytes()], file


def test_a_damaged_checkpoint_is_announced_and_the_one_before_it_gives_the_same_end(whole, tmp_path: Path, monkeypatch, data):
    recipe = tiny_recipe(tmp_path, data, adapter=DROPOUT, eval={"prompts": ["and then?"]})
    killed_at(5, monkeypatch, recipe)
    state = tmp_path / "run/checkpoints/step-00000004/state.json"
    state.write_bytes(state.read_bytes().replace(b'"step":4', b'"step":5'))
    again, printed = made(recipe, resume=True)
    assert "step-00000004: state.json was changed" in printed and "Going on after step 3 of 6" in printed
    assert losses(again.folder) == losses(whole[0].folder)


def test_what_was_answered_before_stays_what_the_base_answered(tmp_path: Path, monkeypatch, data):
    """A run that goes on may ask other questions; the half-trained model must not answer for the untrained one."""
    slow = {"eval": {"max_new_tokens": 8}, "optim": {"lr": 2e-2}}
    recipe = tiny_recipe(tmp_path, data, **slow)
    killed_at(5, monkeypatch, recipe)
    first = json.loads((tmp_path / "run/before.json").read_text())
    more = tiny_recipe(tmp_path, data, optim=slow["optim"], eval={**slow["eval"], "prompts": ["what is 1 times 1?", "how do you do"]})
    run, _ = made(more, resume=True)
    samples = run.report["samples"]
    assert [sample["before"] for sample in samples[:2]] == [sample["before"] for sample in first]
    for sample in samples[2:]:
        asked = [{"role": "user", "content": sample["prompt"]}]
        assert sample["before"] == run.loaded.answer(asked, max_new_tokens=8, tuned=False).strip()
        assert sample["after"] == run.loaded.answer(asked, max_new_tokens=8).strip()
    assert [sample["before"] for sample in samples] != [sample["after"] for sample in samples]


# ---- What is refused ---------------------------------------------------------------------------------------------


def test_the_same_name_again_is_refused(whole):
    run, _ = whole
    with pytest.raises(StorageError, match="run is there already") as raised:
        made(run.recipe)
    assert "pantheraml resume" in raised.value.fix and "run.name" in raised.value.fix


def test_without_a_name_the_next_one_is_taken_and_resume_takes_the_last(tmp_path: Path, data, monkeypatch):
    recipe = tiny_recipe(tmp_path, data, run={"name": None}, eval={"generate_rows": 0}, optim={"steps": 2})
    assert made(recipe)[0].folder.name == "llama-faq"
    killed_at(
        1, monkeypatch, tiny_recipe(tmp_path, data, run={"name": None, "save_every": 1}, eval={"generate_rows": 0}, optim={"steps": 2})
    )
    assert made(recipe, resume=True)[0].folder.name == "llama-faq-2"
    assert [run.report is not None for run in list_runs(tmp_path)] == [True, True]


def test_a_run_with_moments_in_8_bits_goes_on_bit_for_bit_and_only_so(tmp_path: Path, data, monkeypatch):
    pytest.importorskip("bitsandbytes")
    how = {"eval": {"generate_rows": 0}, "run": {"save_every": 1}}
    eight = {"optim": {"steps": 6, "states": "8bit"}, **how}
    run, _ = made(tiny_recipe(tmp_path / "whole", data, **eight))
    plain, _ = made(tiny_recipe(tmp_path / "float32", data, optim={"steps": 6}, **how))
    assert losses(run.folder)[-1] == pytest.approx(losses(plain.folder)[-1], rel=0.05) and losses(run.folder)[-1] < losses(run.folder)[0]
    sizes = [(each.folder / "checkpoints/step-00000006/tensors.safetensors").stat().st_size for each in (run, plain)]
    assert sizes[0] < 0.6 * sizes[1]  # 4 + 2 bytes a weight instead of 4 + 8, and names
    killed_at(3, monkeypatch, tiny_recipe(tmp_path / "cut", data, **eight))
    with pytest.raises(RecipeError, match=r"optim\.states differ"):
        made(tiny_recipe(tmp_path / "cut", data, optim={"steps": 6}, **how), resume=True)
    again, printed = made(tiny_recipe(tmp_path / "cut", data, **eight), resume=True)
    assert "Going on after step 3" in printed and losses(again.folder) == losses(run.folder)


def test_going_on_with_another_recipe_is_refused_by_the_names_of_its_keys(whole, data):
    folder = whole[0].folder.parent
    other = tiny_recipe(folder, data, adapter={**DROPOUT, "rank": 8}, optim={"lr": 1e-3}, run={"seed": 1, "log_every": 1})
    with pytest.raises(RecipeError, match=r"adapter\.rank, optim\.lr, run\.seed differ") as raised:
        made(other, resume=True)
    assert "pantheraml resume" in raised.value.fix


def test_a_folder_in_use_is_refused(tmp_path: Path, data):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"), pytest.raises(StorageError, match="is in use by another process"):
        made(tiny_recipe(tmp_path, data))
    assert not (tmp_path / "run/recipe.yaml").exists()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: Not a directory") as raised:
        made(tiny_recipe(tmp_path / "file", data))
    assert "run.folder" in raised.value.fix


def test_a_run_that_fails_before_its_first_checkpoint_leaves_its_name_free(tmp_path: Path):
    rows = [*chats(12), {"messages": "not a list"}]
    with pytest.raises(DataError, match="<memory>:13 cannot be used"):
        made(tiny_recipe(tmp_path), rows)
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {".lock", "bad_rows.jsonl"}
    run, _ = made(
        tiny_recipe(tmp_path, data={"train": "<memory>", "on_bad_row": "skip"}, optim={"steps": 1}, eval={"generate_rows": 0}), rows
    )
    assert run.report["data"]["bad_rows"] == 1


@pytest.mark.parametrize("name", ["adapter/notes.txt", ".cache.deadbeef", "base/config.json"])
def test_a_folder_that_is_no_run_is_not_touched(tmp_path: Path, data, name: str):
    theirs = tmp_path / "run" / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("mine")
    for resume in (False, True):
        with pytest.raises(StorageError, match="is there already, and is no run"):
            made(tiny_recipe(tmp_path, data), resume=resume)
    assert theirs.read_text() == "mine" and [place for place in (tmp_path / "run").rglob("*") if place.is_file()] == [theirs]


def test_a_name_that_is_not_asked_for_passes_by_a_folder_that_is_no_run(tmp_path: Path):
    recipe = recipe_from({"model": "tiny:llama", "data": "faq.jsonl", "run": {"folder": str(tmp_path)}})
    (tmp_path / "llama-faq").mkdir()
    (tmp_path / "llama-faq" / "notes.txt").write_text("mine")
    with open_folder(recipe, resume=False) as (folder, named):
        assert folder.name == named.run.name == "llama-faq-2"
    with open_folder(recipe, resume=True) as (folder, _):
        assert folder.name == "llama-faq-2"


def test_a_run_name_that_is_a_path_is_refused(tmp_path: Path, data):
    for name in ("../x", "a/b", ".."):
        with pytest.raises(RecipeError, match="is a path"):
            made(tiny_recipe(tmp_path, data, run={"name": name}))


def test_what_only_changes_rounding_may_be_asked_for_when_a_run_goes_on(tmp_path: Path, monkeypatch, data):
    recipe = tiny_recipe(tmp_path, data, eval={"generate_rows": 0})
    killed_at(3, monkeypatch, recipe)
    changed = recipe.model_copy(
        update={
            "hardware": recipe.hardware.model_copy(update={"checkpointing": "on"}),
            "batch": recipe.batch.model_copy(update={"micro_tokens": 1024}),
        }
    )
    before = json.loads((tmp_path / "run/plan.json").read_text())
    (tmp_path / "run/plan.json").write_text(json.dumps(before | {"whole": True, "graphs": True}))
    run, said = made(changed, resume=True)
    plan = json.loads((run.folder / "plan.json").read_text())
    assert set(plan["levels"]) == {"all"} and plan["micro_tokens"] == 1024
    # What follows from them is planned anew.
    assert not plan["whole"] and not plan["graphs"]
    assert plan["memory"] == survey(changed).plan.to_dict()["memory"] != before["memory"]
    assert "levels=4 all, micro_tokens=1024" in said and "Going on after step" in said


def test_a_run_in_which_memory_ran_out_goes_on_with_the_levels_it_came_to(tmp_path: Path, monkeypatch, data):
    recipe = tiny_recipe(tmp_path, data, eval={"generate_rows": 0}, run={"save_every": "end"})
    real, short, used = TorchEngine._gradients, [True], []

    def gradients(self, batch, k, parts):
        if k == 2 and short.pop():
            raise MemoryError("no room")
        return real(self, batch, k, parts)

    def layer(self, *given, **how):
        used.append(how["keep"] or how["tile"] or how["again"])
        return computed(self, *given, **how)

    short.insert(0, False)
    computed = Decoder._layer
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "_gradients", gradients)
        killed_at(4, patch, recipe)
    monkeypatch.setattr(Decoder, "_layer", layer)
    run, said = made(recipe, resume=True)
    assert "Going on after step 3" in said and any(used)  # computed again in backward, as it came to be
    (note,) = [note for note in run.report["notes"] if "no room" in note or "Out of memory" in note]
    assert "from here on with layers at 4 all" in note
    wanted = made(tiny_recipe(tmp_path / "whole", data, eval={"generate_rows": 0}))[0]
    assert losses(run.folder) == losses(wanted.folder)


def test_what_a_model_that_is_here_holds_is_free_for_its_plan(tmp_path: Path, data, monkeypatch):
    real = survey_module.find

    def standing_still(ask):
        found = real(ask)
        device = replace(found.device, free_bytes=8 << 30)
        return replace(found, device=device, inventory=replace(found.inventory, devices=(device,)))

    monkeypatch.setattr(survey_module, "find", standing_still)
    recipe, model = tiny_recipe(tmp_path, data), AutoModelForCausalLM.from_config(tiny_config("llama"))
    plans = [survey(recipe).plan, survey(recipe, model=model, tokenizer=tiny_tokenizer()).plan]
    weights = sum(each.numel() for each in model.parameters()) * 4
    assert [plan.device.free_bytes for plan in plans] == [8 << 30, (8 << 30) + weights]
    assert plans[0].memory == plans[1].memory


def test_a_run_is_judged_wherever_its_model_can_be_loaded(tmp_path: Path, data):
    """What was chosen for training on another device does not matter."""
    run, _ = made(tiny_recipe(tmp_path, data, eval={"generate_rows": 0}))
    recipe = run.recipe
    model = recipe.model.model_copy(update={"load_in_fp8": True})
    hardware = recipe.hardware.model_copy(update={"graphs": "on", "checkpointing": "offload", "compile": "on"})
    elsewhere = recipe.model_copy(update={"model": model, "hardware": hardware})
    assert evaluate(elsewhere, run.loaded)["loss"] == pytest.approx(run.report["eval"]["loss_after"], rel=SAME)


def test_a_run_that_goes_on_elsewhere_reports_the_device_that_it_is_on(tmp_path: Path, monkeypatch, data):
    recipe = tiny_recipe(tmp_path, data, eval={"generate_rows": 0})
    killed_at(3, monkeypatch, recipe)
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    here = plan["device"]["name"]
    plan["device"] |= {"name": "OTHER MACHINE", "free_bytes": 5 << 40, "peak_flops": 1e15}
    (tmp_path / "run/plan.json").write_text(json.dumps(plan))
    run, said = made(recipe, resume=True)
    assert "The run began on cpu:0 (OTHER MACHINE) and goes on on cpu:0" in " ".join(said.split())
    assert run.report["device"]["name"] == here
    assert "OTHER" not in (run.folder / "report.md").read_text() and "OTHER" not in (run.folder / "plan.json").read_text()
    assert run.report["plan"]["memory_bytes"]["since_step"] > 0


def test_a_report_outlives_its_plot(tmp_path: Path, monkeypatch, data):
    def no_room(*all, **more):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(report, "plot_loss", no_room)
    run, _ = made(tiny_recipe(tmp_path, data, eval={"generate_rows": 0}))
    assert run.report["notes"][-1] == "loss.png could not be drawn: no room for a picture"
    assert not (run.folder / "loss.png").exists()


def test_memory_is_measured_as_it_was_planned(tmp_path: Path, data):
    run, _ = made(tiny_recipe(tmp_path, data, eval={"generate_rows": 0}))
    memory = run.report["plan"]["memory_bytes"]
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    assert memory["measured"] + memory["held_before"] <= peak + (1 << 20)  # the kernel counts pages a little late
    assert memory["held_before"] > 100 << 20  # torch itself, which no plan counts


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path, monkeypatch, data):
    recipe = tiny_recipe(tmp_path, data, eval={"generate_rows": 0})
    killed_at(3, monkeypatch, recipe)
    for name in (".adapter.0a1b2c3d", ".base.0a1b2c3d.old", ".merged", "gguf", "kept.0a1b2c3d", ".notes"):
        (tmp_path / "run" / name).mkdir()
    for name in (".0a1b2c3d", ".report.json.0a1b2c3d", "gguf/.run.q8_0.gguf.0a1b2c3d"):
        (tmp_path / "run" / name).write_bytes(b"half")
    made(recipe, resume=True)
    left = {
        str(place.relative_to(tmp_path / "run"))
        for place in (tmp_path / "run").rglob("*")
        if "0a1b2c3d" in place.name or place.name[0] == "."
    }
    assert left == {".lock", ".notes", "kept.0a1b2c3d"}


def test_other_data_under_the_same_name_is_refused(tmp_path: Path, monkeypatch):
    path = written(tmp_path / "rows.jsonl", ROWS)
    recipe = tiny_recipe(tmp_path, path, eval={"generate_rows": 0})
    killed_at(5, monkeypatch, recipe)
    written(tmp_path / "rows.jsonl", chats(41))
    with pytest.raises(StorageError, match="none of the 2 checkpoints") as raised:
        made(recipe, resume=True)
    assert "with other data or another recipe" in raised.value.why


# ---- Other ways to run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    """Rows from memory, packed, without generation: what the variants below are compared with."""
    return made(tiny_recipe(tmp_path_factory.mktemp("plain"), eval={"generate_rows": 0}, data={"packing": "on"}), ROWS)[0]


def test_rows_from_memory_are_the_rows_of_the_file(plain, tmp_path: Path, data):
    run, _ = made(tiny_recipe(tmp_path, data, eval={"generate_rows": 0}, data={"packing": "on"}))
    assert losses(run.folder) == losses(plain.folder) and plain.recipe.data.train == ("<memory>",)


@pytest.mark.parametrize(
    "change",
    [{"data": {"packing": "off"}}, {"data": {"packing": "off"}, "batch": {"micro_tokens": 192}}, {"hardware": {"checkpointing": "on"}}],
    ids=str,
)
def test_packing_micro_batches_and_checkpointing_change_no_loss(plain, tmp_path: Path, change):
    sections = {"eval": {"generate_rows": 0}, "data": {"packing": "on"}, **change}
    run, _ = made(tiny_recipe(tmp_path, **sections), ROWS)
    plans = [json.loads((each.folder / "plan.json").read_text()) for each in (plain, run)]
    assert [plans[0][key] for key in ("packing", "micro_tokens", "levels")] != [
        plans[1][key] for key in ("packing", "micro_tokens", "levels")
    ]
    assert losses(run.folder) == pytest.approx(losses(plain.folder), rel=SAME)
    assert losses(run.folder, "eval_loss") == pytest.approx(losses(plain.folder, "eval_loss"), rel=SAME)


def test_a_stream_in_the_order_of_the_file_gives_the_losses_of_memory(tmp_path: Path, data):
    how = {"eval": {"generate_rows": 0, "every": "end"}}
    runs = [
        made(
            tiny_recipe(tmp_path / mode, data={"train": data, "eval": data, "max_eval_rows": 4, "shuffle": False, "streaming": mode}, **how)
        )[0]
        for mode in ("on", "off")
    ]
    assert losses(runs[0].folder) == pytest.approx(losses(runs[1].folder), rel=SAME)
    assert runs[0].report["data"]["train_rows"] is None and runs[1].report["data"]["train_rows"] == 40


def test_a_stream_that_was_interrupted_goes_on_bit_for_bit(tmp_path: Path, data, monkeypatch):
    how = {"data": {"train": data, "streaming": "on"}, "eval": {"generate_rows": 0}, "optim": {"steps": None, "epochs": 0.5}}
    run, _ = made(tiny_recipe(tmp_path / "whole", **how))
    killed_at(3, monkeypatch, tiny_recipe(tmp_path / "cut", **how))
    again, printed = made(tiny_recipe(tmp_path / "cut", **how), resume=True)
    assert "Going on after step 3" in printed or "Going on after step 2" in printed
    assert losses(again.folder) == losses(run.folder)


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(tmp_path: Path):
    run, _ = made(tiny_recipe(tmp_path, adapter="full", eval={"generate_rows": 0}), ROWS)
    assert (run.folder / "model").is_dir() and not (run.folder / "adapter").exists()
    assert run.report["train"]["trainable_parameters"] == run.report["train"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    saved = load_file(run.folder / "checkpoints/step-00000006/tensors.safetensors")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], saved[f"weight/{name}"]) for name in loaded)
    assert losses(run.folder)[-1] < losses(run.folder)[0]


def test_the_weights_of_the_best_evaluation_are_what_is_left(tmp_path: Path):
    """Held-out answers that say the opposite: what is learned helps at first (letters), and harms later."""
    held = [
        {"messages": [{"role": "user", "content": f"what is {i} times {i}?"}, {"role": "assistant", "content": "no."}]} for i in range(4)
    ]
    recipe = tiny_recipe(tmp_path, optim={"lr": 2e-2, "steps": 12}, eval={"every": 1, "generate_rows": 0}, run={"keep": 1})
    run, printed = made(recipe, ROWS, held_out=held)
    measured = losses(run.folder, "eval_loss")[1:]
    best = measured.index(min(measured)) + 1
    assert 1 <= best < 12 and min(measured) < losses(run.folder, "eval_loss")[0], "these settings should overfit"
    assert run.report["train"]["kept_step"] == best and "(best so far)" in printed
    assert run.report["eval"]["loss_after"] == pytest.approx(min(measured), rel=1e-6)
    saved = load_file(run.folder / f"checkpoints/step-{best:08d}/tensors.safetensors")
    adapter = load_file(run.folder / "adapter/adapter_model.safetensors")
    weights = {name.removeprefix("weight/").replace(".default", ""): tensor for name, tensor in saved.items() if name.startswith("weight/")}
    assert weights.keys() == adapter.keys() and all(torch.equal(weights[name], adapter[name]) for name in adapter)

    broken = run.folder / f"checkpoints/step-{best:08d}/state.json"
    broken.write_bytes(b"{}")
    (run.folder / "report.json").unlink()
    again, printed = made(recipe, ROWS, held_out=held, resume=True)
    assert again.report["train"]["kept_step"] == 12 and "weights of the last step are kept instead" in printed
    assert any("the last step are kept" in note for note in again.report["notes"])


def test_bad_rows_are_left_out_listed_and_counted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    written(path, [*chats(20), {"messages": []}, {"other": 1}])
    path.write_text(path.read_text() + "{broken\n")
    for streaming in ("off", "on"):
        recipe = tiny_recipe(
            tmp_path / streaming,
            data={"train": str(path), "on_bad_row": "skip", "streaming": streaming},
            eval={"generate_rows": 0},
            optim={"steps": None, "epochs": 1.0},
        )
        run, printed = made(recipe)
        listed = [json.loads(line) for line in (run.folder / "bad_rows.jsonl").read_text().splitlines()]
        assert sorted(bad["line"] for bad in listed) == [21, 22, 23], streaming
        assert all(bad["file"] == str(path) and bad["reason"] for bad in listed)
        assert run.report["data"]["bad_rows"] == 3
        if streaming == "off":
            assert "3 rows cannot be used and are left out" in printed


def test_evaluation_rows_that_are_also_learned_are_announced(tmp_path: Path):
    run, printed = made(tiny_recipe(tmp_path, optim={"steps": 1}, eval={"generate_rows": 0}), ROWS, held_out=ROWS[:3])
    assert "3 of 3 evaluation examples also stand in the training data" in printed
    assert run.report["data"]["in_both"] == 3 and "also stand in the training data" in (run.folder / "report.md").read_text()


def poisoned(folder: Path, character: str) -> str:
    """A base that is sound but for one character, at which its numbers are infinite."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer().convert_tokens_to_ids(character)] = float("inf")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_run_that_diverges_names_step_and_rows_and_keeps_the_weights_before_it(tmp_path: Path):
    rows = chats(16)
    rows[9] = {"messages": [{"role": "user", "content": "and ~?"}, {"role": "assistant", "content": "that"}]}
    how = {"model": poisoned(tmp_path / "base", "~"), "eval": {"generate_rows": 0}}
    recipe = tiny_recipe(tmp_path, data={"eval_fraction": 0.0, "shuffle": False, "packing": "off"}, **how)
    with pytest.raises(DivergedError, match="step 3 is not finite: loss nan") as raised:
        made(recipe, rows)
    assert "<memory>:10" in raised.value.why and "step 2 are kept" in raised.value.why and raised.value.exit_code == 5
    folder = tmp_path / "run"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    saved = load_file(folder / "checkpoints/step-00000002/tensors.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not (folder / "adapter").exists() and not (folder / "report.json").exists()


def test_a_model_that_is_not_finite_to_begin_with_does_not_train(tmp_path: Path):
    recipe = tiny_recipe(tmp_path, model=poisoned(tmp_path / "base", "w"), eval={"generate_rows": 0})
    with pytest.raises(DivergedError, match="held-out loss after step 0 is not finite"):
        made(recipe, ROWS)


def test_a_model_that_carries_state_along_the_row_trains_unpacked(tmp_path: Path):
    run, _ = made(
        tiny_recipe(tmp_path, model="tiny:falcon_h1", optim={"steps": 3, "lr": 1e-2}, eval={"generate_rows": 0, "every": "end"}), ROWS
    )
    plan = json.loads((run.folder / "plan.json").read_text())
    assert plan["packing"] is False and plan["reasons"]["packing"]
    assert losses(run.folder)[-1] < losses(run.folder)[0]


def test_packing_that_was_asked_for_is_refused_where_the_model_mixes_rows(tmp_path: Path):
    recipe = tiny_recipe(tmp_path, model="tiny:falcon_h1", data={"packing": "on"})
    with pytest.raises(RecipeError, match="packing") as raised:
        made(recipe, ROWS)
    assert "off" in raised.value.fix


def test_a_tight_plan_is_rehearsed_and_says_what_it_took(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pantheraml.trainer.fast.TIGHT", 0.0)
    plain, quiet_said = made(tiny_recipe(tmp_path / "a", eval={"generate_rows": 0}, optim={"steps": 3}), ROWS)
    monkeypatch.setattr("pantheraml.trainer.fast.TIGHT", 1e9)
    roomy, said = made(tiny_recipe(tmp_path / "b", eval={"generate_rows": 0}, optim={"steps": 3}), ROWS)
    assert "Rehearsed at the largest shape: it took" in quiet_said and "Rehearsed" not in said
    assert losses(plain.folder) == losses(roomy.folder)  # nothing comes of it
