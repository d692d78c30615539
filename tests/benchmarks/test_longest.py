"""The search for the longest sequence finds it, whatever a token takes, and one run of each kind really trains."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def longest():
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("longest", BENCHMARKS / "longest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["longest"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in ("longest", "train_cpu", "contestants"):
        sys.modules.pop(name, None)


def trainer(longest, need, budget, *, slow_over=None, tried=None):
    """Tries of a trainer that needs so many bytes for a length, and is too slow for those over another."""

    def attempt(tokens):
        assert tokens % longest.GRAIN == 0 and tokens > 0
        if tried is not None:
            assert tokens not in tried
            tried.append(tokens)
        if slow_over is not None and tokens > slow_over:
            return longest.Try(tokens=tokens, outcome="time")
        if need(tokens) > budget:
            return longest.Try(tokens=tokens, outcome="memory")
        return longest.Try(
            tokens=tokens, outcome="fits", peak_bytes=need(tokens), planned_bytes=2 * need(tokens), measured_bytes=need(tokens)
        )

    return attempt


@pytest.mark.parametrize("per_token", [997, 12_345, 70_001, 350_003, 900_001, 4_100_001, 9_000_001])
@pytest.mark.parametrize("bent", [0.0, 0.02, -0.2])
def test_the_longest_that_fits_is_found(longest, per_token, bent):
    """Also where the need is no line: it bends by up to a fifth for each time that the length doubles."""
    budget, most = 1 << 30, 1 << 17

    def need(tokens):
        return int(3e7 + per_token * tokens * (tokens / 1024) ** bent)

    tried = []
    found = longest.summary(longest.search(trainer(longest, need, budget, tried=tried), budget, most), budget)
    expected = max((n for n in range(longest.GRAIN, most + 1, longest.GRAIN) if need(n) <= budget), default=0)
    assert found["longest"] == expected
    assert found["limit"] == ("most" if expected == most else "memory")
    assert found["estimated_longest"] is None
    assert len(tried) <= 18  # doubling and halving alone take up to 7 + 8, and a last length tells what a token takes
    if expected > longest.GRAIN:
        assert found["plan_error"] == pytest.approx(1, abs=1e-3)
        assert found["bytes_per_token"] == pytest.approx(per_token, rel=0.7 if bent else 1e-4)


def test_where_time_was_the_limit_the_longest_is_estimated(longest):
    budget = 1 << 30
    attempt = trainer(longest, lambda tokens: 10_000_000 + 50_000 * tokens, budget, slow_over=3000)
    found = longest.summary(longest.search(attempt, budget, 1 << 17), budget)
    assert found["longest"] == 2816 and found["limit"] == "time"
    assert found["estimated_longest"] == (budget - 10_000_000) // 50_000 // 256 * 256
    # Even the first length was too slow: one more is tried, for the line.
    attempt = trainer(longest, lambda tokens: 10_000_000 + 50_000 * tokens, budget, slow_over=600)
    found = longest.summary(longest.search(attempt, budget, 1 << 17), budget)
    assert found["longest"] == 512 and found["bytes_per_token"] == 50_000 and found["estimated_longest"] == 21248


def test_nothing_fits(longest):
    found = longest.summary(longest.search(trainer(longest, lambda _: 2, 1), 1, 1 << 17), 1)
    assert found["longest"] == 0 and found["limit"] == "memory" and found["peak_bytes"] is None


def test_other_losses_and_failures_are_wrong(longest):
    def result(*tries):
        return longest.summary([longest.Try(**each) for each in tries], 1)

    same = {"tokens": 256, "outcome": "fits", "peak_bytes": 1, "loss": 2.0}
    assert longest.wrong({"ours-off": result(same), "peft": result({**same, "loss": 2.001})}) == []
    (problem,) = longest.wrong({"ours-off": result(same), "ours-on": result({**same, "loss": 2.1})})
    assert problem == "ours-on, 256 tokens: a loss of 2.10000, and 2.00000 of ours-off"
    broken = {"tokens": 512, "outcome": "failed", "said": "exit status 1: it broke"}
    assert longest.wrong({"peft": result(broken)}) == []
    assert longest.wrong({"ours-off": result(broken)}) == ["ours-off, 512 tokens: exit status 1: it broke"]


@pytest.mark.slow
def test_longest(tmp_path):
    words = ("--shape", "tiny", "--budget", "600", "--most", "300", "--threads", "1", "--contestants", "ours-tiled", "peft-checkpointing")
    done = subprocess.run([sys.executable, BENCHMARKS / "longest.py", *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True and result["benchmark"] == "longest" and result["wrong"] == []
    assert result["budget_bytes"] == 600 << 20 and result["most_tokens"] == 256
    assert result["versions"].keys() == {"torch", "transformers", "peft", "pantheraml"}
    assert list(result["results"]) == ["ours-tiled", "peft-checkpointing"]
    for found in result["results"].values():
        assert found["longest"] == 256 and found["limit"] == "most" and found["estimated_longest"] is None
        assert 0 < found["peak_bytes"] < 600 << 20 and found["seconds"] > 0
        (tried,) = found["tries"]
        assert tried["outcome"] == "fits" and tried["loss"] > 0
    ours = result["results"]["ours-tiled"]
    assert "tiled" in ours["settings"]
    # The report's measurement begins a little later and ends later than ours.
    assert 0 < ours["measured_bytes"] < ours["planned_bytes"]
    assert ours["plan_error"] == pytest.approx(ours["planned_bytes"] / ours["measured_bytes"] - 1, abs=1e-4)
    planned = result["planned_longest"]
    assert planned["ours-tiled"] >= planned["ours-on"] >= planned["ours-cheap"] >= planned["ours-off"] > 0
    assert planned["ours-auto"] == planned["ours-tiled"] == ours["planned_longest"]
    assert not list(tmp_path.iterdir())
