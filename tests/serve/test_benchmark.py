"""The benchmark of the service runs, and finds every answer where it belongs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    words = [sys.executable, str(script), "--quick", "--seconds", "3", "--kill", "0.3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True and result["benchmark"] == "serve"
    assert result["answers"] >= 8 and result["killed"] > 0
    assert result["wrong"] == 0 and result["errors"] == {} and result["rows_free_at_the_end"] and result["exit_status"] == 0
    assert result["requests"] == result["answers"] + result["killed"]
    assert 0 < result["first_token_ms"]["p50"] <= result["first_token_ms"]["p99"] and result["most_rows_busy"] == 4
    assert not list(tmp_path.iterdir())
