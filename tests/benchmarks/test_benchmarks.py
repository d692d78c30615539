"""The benchmarks run, say what they count, and hold what they promise. How fast anything is stands in no test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8"))


def run(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / name, *words], capture_output=True, text=True, cwd=cwd, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_there_without_loading_torch(name, tmp_path):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", BENCHMARKS / name, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "--quick" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "transformers", "trl", "pantheraml"}
    # Loading torch, transformers and trl takes about 15 s; this takes 0.2 s on an idle machine.
    assert time.perf_counter() - began < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_survive(tmp_path):
    result = last_line(run("survive.py", "--quick", cwd=tmp_path))
    assert result["ok"] is True
    assert result["benchmark"] == "survive"
    assert result["kills"] == result["resumed"] == len(result["kill_list"]) == 3
    assert result["identical"] is True
    assert all(same == of and of > 0 for same, of in result["equal"].values())
    assert result["flips"] == result["flips_detected"] == 10
    assert result["tampered"] == result["tampered_refused"] == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parity_trl(tmp_path):
    pytest.importorskip("trl")
    result = last_line(run("parity_trl.py", "--quick", cwd=tmp_path))
    assert result["ok"] is True
    assert result["benchmark"] == "parity_trl"
    assert result["labels_compared"] > 1000
    assert result["max_relative_difference"] <= result["tolerance"] == 1e-4
    assert result["adapter_relative_difference"] < 1e-3
    assert set(result["median_ratio"]) == set(result["ratios"]) == {"as it comes", "padding_free", "packing"}
    assert all(len(each) == result["pairs"] == 3 for each in result["ratios"].values())
    assert set(result["tokens_per_s"]) == {"ours", *result["ratios"]}
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_cpu_in_turns(tmp_path):
    """Prompts masked, examples of different lengths: packed by ours, padded by the others, and the same labels and losses."""
    pytest.importorskip("trl")
    words = ("--shape", "tiny", "--data", "mix:64", "--rounds", "1", "--threads", "1", "--contestants", "peft", "trl", "ours")
    result = last_line(run("train_cpu.py", *words, cwd=tmp_path))
    assert result["ok"] is True
    assert result["benchmark"] == "train_cpu"
    assert result["versions"].keys() >= {"torch", "transformers", "peft", "trl", "pantheraml"}
    (case,) = result["cases"]
    assert case["wrong"] == [] and case["left_out"] == {} and case["searched"] == []
    assert list(case["results"]) == ["peft", "trl", "ours"]
    labels, losses = case["results"]["peft"]["labels"], case["results"]["peft"]["losses"]
    assert len(labels) == 3 and sum(labels) == case["labels"]
    for mine in case["results"].values():
        assert mine["labels"] == labels
        assert sum(mine["tokens"]) == case["tokens"] > 2 * case["labels"] - 16 * 3
        # bfloat16 has 8 bits; over some hundred tokens its errors of both signs nearly vanish.
        assert mine["losses"] == pytest.approx(losses, rel=5e-3)
        assert mine["ratios"].keys() == {"trl", "ours"} and mine["memory_ratios"].keys() == {"trl"}
        assert 0 < mine["peak_above_start_bytes"] < mine["peak_bytes"]
        assert mine["tokens_per_s"] > 0 and mine["share_of_peak"] > 0
    assert case["results"]["trl"]["ratios"]["trl"] == {"median": 1, "min": 1, "max": 1}
    assert [aim["aim"] for aim in case["aims"]] == ["ours at least 6.0 x trl", "ours at most 0.7 of the memory of trl"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_cpu_searches_the_best_settings(tmp_path):
    pytest.importorskip("trl")
    words = ("--shape", "tiny", "--data", "32", "--rounds", "1", "--threads", "1", "--contestants", "trl-best", "ours")
    result = last_line(run("train_cpu.py", *words, cwd=tmp_path))
    (case,) = result["cases"]
    assert case["wrong"] == []
    tried = {each["settings"]: each["tokens_per_s"] for each in case["searched"]}
    assert len(tried) == 4 and all("gradient_checkpointing=False" in settings for settings in tried)
    assert case["results"]["trl-best"]["settings"] == max(tried, key=tried.__getitem__)
    assert case["results"]["ours"]["ratios"].keys() == {"trl-best", "ours"}


def test_train_gpu_says_that_it_needs_one(tmp_path):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("there is a GPU here")
    done = run("train_gpu.py", "all", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_gpu.py needs a GPU") and "--device cpu --shape tiny" in done.stderr
    refused = run("train_gpu.py", "ours", "--device", "cpu", "--shape", "llama-3.2-1b", cwd=tmp_path)
    assert refused.returncode == 2 and "measures nothing" in refused.stderr


@pytest.mark.slow
def test_train_gpu_runs_without_one(tmp_path):
    words = ("--quick", "--device", "cpu", "--shape", "tiny", "--batch", "2x64", "--weights", str(tmp_path / "weights"))
    done = run(
        "train_gpu.py", "all", *words, "--only", "peft-keep", "ours-keep-bf16", "ours-all", "ours-keep-fp8", "liger-keep", cwd=tmp_path
    )
    result = last_line(done)
    assert result["ok"] is True
    assert result["benchmark"] == "train_gpu"
    assert result["gpu"] is False and "NOT A FIGURE OF A GPU" in done.stdout
    (case,) = result["cases"]
    results = case["results"]
    assert list(results) == ["peft-keep-bf16", "liger-keep-bf16", "ours-keep-bf16", "ours-all-bf16", "ours-keep-fp8"]
    assert "fp8" in results["ours-keep-fp8"]["absent"]  # that is for Hopper GPUs
    if result["versions"]["liger-kernel"] is None:
        assert results["liger-keep-bf16"]["absent"] == "liger-kernel is not installed"
        assert "liger-kernel is not installed" in done.stdout
    for name in ("peft-keep-bf16", "ours-keep-bf16", "ours-all-bf16"):
        mine = results[name]
        assert mine["labels"] == [126] * 3 and mine["tokens"] == [128] * 3
        assert mine["losses"] == pytest.approx(results["peft-keep-bf16"]["losses"], rel=5e-3)
        assert mine["peak_bytes"] is None and mine["gpu"] is False
        assert {"tokens_per_s", "useful_tflops", "reserved_bytes", "start_s", "first_step_s", "settings", "versions"} <= mine.keys()


@pytest.mark.slow
def test_distributed(tmp_path):
    result = last_line(run("distributed.py", "--quick", cwd=tmp_path))
    assert result["ok"] is True
    assert [line["adapter"] for line in result["lines"]] == ["lora", "lora", "lora", "full", "nf4"]
    for line in result["lines"]:
        assert line["loss"] <= 1e-6 and line["weights"] <= 1e-5
        assert line["bytes"] == line["formula_bytes"] > 0
    assert not list(tmp_path.iterdir())
