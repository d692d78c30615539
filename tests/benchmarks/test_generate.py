"""The benchmark of answers runs, and the answers that it counts are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_answers_are_equal_in_float32(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "generate.py"
    words = [sys.executable, script, "--quick", "--kind", "cpu", "--threads", "1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True and result["benchmark"] == "generate"
    assert set(result["equal"].values()) == {1.0} and len(result["equal"]) == 8
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
