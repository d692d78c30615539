"""The benchmarks run, say what they count, and hold what they promise. How fast anything is stands in no test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / name, *words], capture_output=True, text=True, cwd=cwd, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
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
