"""Every verb from a terminal's point of view: what it prints where, which code it ends with, and what a mistake is answered."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.tiny import chats, written
from transformers import AutoModelForCausalLM

from pantheraml import cli
from pantheraml.models.tiny import tiny_config, tiny_tokenizer

SMALL = ("batch.size=4", "model.dtype=float32", "hardware.threads=1", "eval.generate_rows=2", "eval.max_new_tokens=4", "optim.steps=3")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def refused(self, code: int, *parts: str) -> None:
        """It ended with the three lines for a person, and nothing else but notes."""
        assert self.code == code, self.err
        assert "error: " in self.err and "\n  why: " in self.err and "\n  fix: " in self.err
        assert "Traceback" not in self.err and "Traceback" not in self.out
        for part in parts:
            assert part in self.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def data(folder) -> str:
    return written(folder / "rows.jsonl", chats(24))


@pytest.fixture
def pantheraml(capsys, monkeypatch):
    """The command, as `main` runs it."""

    def run(*words: object, said: str = "") -> Done:
        capsys.readouterr()
        # monkeypatch remembers what was there, so that nothing is left of what main sets.
        for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "passive", "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["pantheraml", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return Done(int(code), printed.out, printed.err)

    return run


@pytest.fixture
def run(pantheraml, folder, data) -> Path:
    """A run, made by the first test that needs one."""
    place = folder / "runs/cli"
    if not place.exists():
        done = pantheraml("train", "tiny:llama", data, f"run.folder={folder / 'runs'}", "run.name=cli", *SMALL, "--json")
        assert done.code == 0, done.err
        (folder / "printed.json").write_text(done.out)
        (folder / "said.txt").write_text(done.err)
    return place


# ---- Help --------------------------------------------------------------------------------------------------------


def test_help_names_verbs_exit_codes_and_unsloth_and_loads_no_torch():
    code = "import sys; from pantheraml import cli; sys.argv = ['pantheraml', '--help']\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("False")
    for word in ("train", "resume", "plan", "chat", "export", "devices", "Unsloth", "unsloth.ai", "75"):
        assert word in done.stdout


@pytest.mark.parametrize("words", [(), ("data",), ("recipe",)], ids=str)
def test_a_command_alone_shows_its_help(pantheraml, words):
    done = pantheraml(*words)
    assert done.code in (0, 2) and "Usage: pantheraml" in done.out + done.err


# ---- Training ----------------------------------------------------------------------------------------------------


def test_train_prints_its_result_as_json_and_its_progress_on_stderr(run, folder):
    report = json.loads((folder / "printed.json").read_text())
    assert report == json.loads((run / "report.json").read_text())
    assert (report["run"], report["train"]["steps"], report["model"]) == ("cli", 3, "tiny:llama")
    said = (folder / "said.txt").read_text()
    assert "step 3/3  loss" in said and "Data: messages" in said


def test_train_for_people_ends_with_results_and_what_to_do_next(pantheraml, folder, data):
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: tiny:llama\ndata: {data}\nrun: {{folder: {folder / 'runs'}, name: second}}\n")
    done = pantheraml("train", recipe, *SMALL, "adapter=full", "optim.steps=1")
    assert done.code == 0, done.err
    assert "exact match on" in done.out and "held-out loss:" in done.out and "next:" in done.out
    place = folder / "runs/second"
    assert f"pantheraml chat {place}\n" in done.out and "--compare" not in done.out  # every weight was trained
    assert (place / "model").is_dir()
    done = pantheraml("resume", place)
    assert done.code == 0 and "has ended already" in done.err


def test_dry_run_and_plan_print_the_plan_and_make_nothing(pantheraml, folder, data):
    words = ("tiny:llama", data, f"run.folder={folder / 'nothing'}", *SMALL)
    made = [pantheraml("train", *words, "--dry-run"), pantheraml("plan", *words)]
    for done in made:
        assert done.code == 0
        values = dict(line.split()[:2] for line in done.out.splitlines() if line[:1].strip())
        assert (values["dtype"], values["packing"], values["threads"]) == ("float32", "on", "1") and "Data: messages" in done.err
    as_json = json.loads(pantheraml("plan", *words, "--json").out)
    assert (as_json["dtype"], as_json["batch_size"], as_json["device"]["kind"]) == ("float32", 4, "cpu")
    assert not (folder / "nothing").exists()


def test_runs_lists_what_has_ended_and_what_has_not(pantheraml, run, folder, tmp_path):
    (folder / "runs/cut").mkdir(exist_ok=True)
    (folder / "runs/cut/recipe.yaml").write_text((run / "recipe.yaml").read_text())
    done = pantheraml("runs", folder / "runs")
    assert f"{run}  tiny:llama  3 steps  held-out loss" in done.out
    assert f"{folder / 'runs/cut'}  not ended; go on with: pantheraml resume" in done.out
    listed = json.loads(pantheraml("runs", folder / "runs", "--json").out)
    assert {Path(each["run"]).name: each["ended"] for each in listed}["cut"] is False
    assert "there are no runs" in pantheraml("runs", tmp_path).out


# ---- What was trained --------------------------------------------------------------------------------------------


def test_generate_answers_each_prompt(pantheraml, run):
    done = pantheraml("generate", run, "what is 1 times 1?", "and 2?", "--max-new-tokens", 3, "--json")
    assert [answer["prompt"] for answer in json.loads(done.out)] == ["what is 1 times 1?", "and 2?"]
    plain = pantheraml("generate", run, "what is 1 times 1?", "--max-new-tokens", 3)
    assert plain.out.rstrip("\n") == json.loads(done.out)[0]["answer"]
    assert pantheraml("generate", "tiny:llama", "hello", "--max-new-tokens", 2).code == 0


def test_chat_answers_piped_lines_and_remembers_the_talk(pantheraml, run):
    done = pantheraml("chat", run, "--max-new-tokens", 3, said="what is 1 times 1?\nand 2?\n\nnot read any more\n")
    assert done.code == 0 and "> " not in done.out
    first = pantheraml("generate", run, "what is 1 times 1?", "--max-new-tokens", 3).out
    assert done.out.startswith(first.rstrip("\n"))


def test_chat_compares_with_the_base(pantheraml, run):
    done = pantheraml("chat", run, "--compare", "--max-new-tokens", 3, said="what is 1 times 1?\n")
    tuned = pantheraml("generate", run, "what is 1 times 1?", "--max-new-tokens", 3).out.rstrip("\n")
    base = pantheraml("generate", run / "base", "what is 1 times 1?", "--max-new-tokens", 3).out.rstrip("\n")
    assert done.out.rstrip("\n") == f"base:  {base}\ntuned: {tuned}"
    pantheraml("chat", "tiny:llama", "--compare", said="hello\n").refused(2, "there is no base to compare with", "--compare")


def test_eval_measures_what_the_report_says(pantheraml, run, data):
    report = json.loads((run / "report.json").read_text())
    found = json.loads(pantheraml("eval", run, "--max-new-tokens", 4, "--rows", 2, "--json").out)
    assert found["loss"] == pytest.approx(report["eval"]["loss_after"], rel=1e-5)  # packed and not packed add in another order
    assert found["rows"] == report["data"]["eval_rows"] and len(found["samples"]) == found["answered_rows"]
    done = pantheraml("eval", run, data, "--max-new-tokens", 2, "--rows", 1)
    assert done.out.startswith("loss ") and "on 24 rows, exact match" in done.out
    pantheraml("eval", "tiny:llama").refused(2, "eval needs rows")


def test_export_leads_to_each_form(pantheraml, run, tmp_path):
    assert "peft.PeftModel" in pantheraml("export", run, "--to", "adapter").out
    assert pantheraml("export", run, "--to", "adapter", "--out", tmp_path / "a").code == 0
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (run / "adapter/adapter_model.safetensors").read_bytes()
    pantheraml("export", run, "--to", "adapter", "--out", tmp_path / "a").refused(6, str(tmp_path / "a"))
    done = pantheraml("export", run, "--to", "merged", "--out", tmp_path / "m")
    assert "logits differ by" in done.out and AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    done = pantheraml("export", run, "--to", "ollama", "--type", "f32", "--out", tmp_path / "g.gguf", "--no-verify")
    assert done.code == 0 and "next: ollama create cli" in done.out
    assert (tmp_path / "g.gguf").read_bytes().startswith(b"GGUF") and (tmp_path / "Modelfile").exists()
    again = ("export", run, "--to", "ollama", "--type", "f32", "--out", tmp_path / "g.gguf", "--no-verify")
    pantheraml(*again).refused(6, f"{tmp_path / 'g.gguf'} is there already", "--overwrite")
    (tmp_path / "g.gguf").unlink()
    pantheraml(*again).refused(6, f"{tmp_path / 'Modelfile'} is there already")
    assert pantheraml(*again, "--overwrite").code == 0


# ---- The machine -------------------------------------------------------------------------------------------------


def test_devices_says_what_is_here_and_what_is_not(pantheraml, tmp_path):
    found = json.loads(pantheraml("devices", "--json", "--folder", tmp_path).out)
    assert found["ok"] is True and any(device["kind"] == "cpu" for device in found["devices"])
    done = pantheraml("doctor", "--folder", tmp_path)
    assert done.code == 0 and "cpu" in done.out


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "70"}, "70")], ids=str
)
def test_threads_that_wait_spin_for_a_moment_unless_the_user_chose(chosen, spins, tmp_path):
    others = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml", "devices", "--folder", str(tmp_path)],
        env={**others, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


# ---- Data and recipes --------------------------------------------------------------------------------------------


def test_data_check_show_convert_and_split(pantheraml, data, tmp_path):
    checked = json.loads(pantheraml("data", "check", data, "--model", "tiny:llama", "--json").out)
    assert (checked["rows"], checked["format"], checked["bad"]) == (24, "messages", [])
    done = pantheraml("data", "check", data)
    assert done.code == 0 and "--model MODEL" in done.out
    assert "it is 0" in pantheraml("data", "show", data, "--rows", 1).out
    out = tmp_path / "alpaca.jsonl"
    assert pantheraml("data", "convert", data, "--out", out, "--to", "alpaca").out == f"{out}: 24 rows as alpaca\n"
    assert json.loads(out.read_text().splitlines()[1])["output"] == "it is 1."
    done = pantheraml("data", "split", data, "--train", tmp_path / "t.jsonl", "--eval", tmp_path / "e.jsonl", "--fraction", 0.25)
    assert f"{tmp_path / 't.jsonl'}: 18 rows; {tmp_path / 'e.jsonl'}: 6 rows" in done.out


def test_data_check_ends_with_3_where_a_row_cannot_be_used(pantheraml, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{broken\n')
    done = pantheraml("data", "check", path)
    assert done.code == 3 and "not valid JSON" in done.out


def test_recipe_explains_itself(pantheraml, tmp_path):
    assert "optim.lr" in pantheraml("recipe", "explain").out
    assert json.loads(pantheraml("recipe", "schema").out)["properties"]["optim"]
    (tmp_path / "example.yaml").write_text(pantheraml("recipe", "example").out)
    assert "Qwen/Qwen3-0.6B" in pantheraml("recipe", "explain", tmp_path / "example.yaml").out


# ---- Mistakes ----------------------------------------------------------------------------------------------------


def test_a_mistake_in_the_recipe_ends_with_2(pantheraml, data, tmp_path):
    pantheraml("train", "tiny:llama").refused(2, "cannot tell what to train from: tiny:llama")
    pantheraml("train", "tiny:llama", data, "optim.learning_rate=1").refused(2, "optim.learning_rate", "did you mean optim.lr=1?")
    pantheraml("plan", "tiny:lama", data).refused(2, "no tiny model of the family 'lama'")
    pantheraml("train", tmp_path / "none.yaml").refused(2, "none.yaml")


def test_usage_that_typer_refuses_ends_with_2(pantheraml, run):
    for words in (("export", run), ("export", run, "--to", "onnx"), ("generate", run), ("fly",), ("chat", run, "--max-new-tokens", "0")):
        done = pantheraml(*words)
        assert done.code == 2 and "Usage:" in done.err and "Traceback" not in done.err


def test_a_mistake_in_the_data_ends_with_3(pantheraml, folder, tmp_path):
    pantheraml("train", "tiny:llama", tmp_path / "rows.jsonl", f"run.folder={tmp_path}").refused(3, "there is no file")
    path = written(tmp_path / "rows.jsonl", [*chats(3), {"messages": 1}])
    pantheraml("train", "tiny:llama", path, f"run.folder={tmp_path / 'runs'}").refused(3, f"{path}:4 cannot be used")
    pantheraml("data", "convert", tmp_path / "gone.jsonl", "--out", tmp_path / "o.jsonl").refused(3, "there is no file")


def test_a_device_that_is_not_here_or_too_small_ends_with_4(pantheraml, data, tmp_path):
    if not getattr(torch, "xpu", None) or not torch.xpu.is_available():
        pantheraml("plan", "tiny:llama", data, "hardware.kind=xpu").refused(4, "xpu")
    pantheraml("plan", "tiny:llama", data, "hardware.kind=cpu", "hardware.index=9").refused(4, "cpu")


def test_a_run_that_diverges_ends_with_5(pantheraml, data, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = (*SMALL, f"run.folder={tmp_path / 'runs'}", "data.eval_fraction=0")
    pantheraml("train", tmp_path / "base", data, *words).refused(5, "step 1 is not finite", "optim.lr")


def test_a_folder_that_cannot_be_used_ends_with_6(pantheraml, run, data, tmp_path):
    pantheraml("train", "tiny:llama", data, f"run.folder={run.parent}", "run.name=cli").refused(6, "is there already", "pantheraml resume")
    pantheraml("resume", tmp_path).refused(6, "holds no run", "pantheraml runs")
    pantheraml("export", tmp_path, "--to", "gguf").refused(6, "holds no run")
    (tmp_path / "file").write_text("")
    pantheraml("data", "convert", data, "--out", tmp_path / "file/o.jsonl").refused(6, "cannot be written")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/recipe.yaml").write_text((run / "recipe.yaml").read_text())
    pantheraml("generate", tmp_path / "cut", "hello").refused(6, "has not ended", "pantheraml resume")
