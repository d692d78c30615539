"""The benchmarks of the council run, and count what they say they count."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pantheraml.council import Persona, Turn

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("council_accuracy", FOLDER / "council_accuracy.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.slow
def test_all_that_is_said_is_equal_in_float32(tmp_path: Path) -> None:
    words = [sys.executable, FOLDER / "council.py", "--quick", "--kind", "cpu", "--threads", "1", "--new", "6"]
    shared: list[int] = []
    for more in ((), ("--adapters",)):
        done = subprocess.run([*words, *more], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["ok"] is True and result["equal"] == {"batched": 1.0, "single": 1.0, "transformers": 1.0}
        assert result["advisors"] == 8 and all(ratio > 0 for ratio in result["speed_up"].values())
        shared.append(result["shared_tokens"])
    assert shared[0] > 2 * shared[1] > 0, "what all see is read once, unless each has an adapter: then each shares with its first round"


def test_the_task_has_one_answer_and_no_row_of_the_test_is_learned(accuracy: ModuleType) -> None:
    texts = accuracy.strings(50, 1)
    assert texts == accuracy.strings(50, 1) and len(set(texts)) == 50
    for text in texts:
        counts = sorted((text.count(letter) for letter in "abcd"), reverse=True)
        assert counts[0] > counts[1] and text.count(accuracy.right_answer(text)) == counts[0]
        assert accuracy.answer(text).endswith(f"Answer: {accuracy.right_answer(text)}")
    personas = [Persona(name=f"n{i}", prompt="Count.") for i in range(3)]
    rows = accuracy.rows(40, personas, random.Random(0))
    asked = [row["messages"][-2]["content"] for row in rows]
    assert not any(text in each for each in asked for text in texts)
    later = [each for each in asked if "n1: " in each]
    assert 5 < len(later) < 35 and all(row["messages"][-1]["content"].count("Answer: ") == 1 for row in rows)


def test_shares_and_votes(accuracy: ModuleType) -> None:
    low, high = accuracy.wilson(80, 100)
    assert (low, high) == (pytest.approx(0.7111, abs=1e-4), pytest.approx(0.8666, abs=1e-4))
    turns = [
        Turn(advisor=str(i), round=0, position=held, answer_logprob=sure)
        for i, (held, sure) in enumerate([("a", -1), ("b", -0.1), ("b", -3)])
    ]
    assert accuracy.held(turns) == "b" and accuracy.held(turns[:2]) == "b" and accuracy.held([turns[0], turns[2]]) == "a"
