"""benchmarks/precision.py runs every form of the base, and says what it computed and through what."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pantheraml.hardware.cpu import multiplies_int8

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"


@pytest.mark.slow
def test_every_form_trains_the_same_task(tmp_path):
    words = [sys.executable, SCRIPT, "--quick", "--threads", "1", "--seeds", "1", "2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "ok", "quick", "seeds", "steps", "held_out_rows", "cpu", "versions", "forms"} == result.keys()
    assert (result["benchmark"], result["ok"], result["quick"], result["seeds"]) == ("precision", True, True, [1, 2])
    forms = result["forms"]
    assert list(forms) == ["float32", "bfloat16", "int8", "nf4", "fp8"]
    here = {"float32", "bfloat16", "fp8"} | ({"int8"} if multiplies_int8() else set()) | ({"nf4"} if find_spec("bitsandbytes") else set())
    assert {form for form, each in forms.items() if "absent" not in each} == here
    assert {form: forms[form]["through"] for form in sorted(here)} == {
        form: "numerics only" if form == "fp8" else "the plan" for form in sorted(here)
    }
    for form in here:
        each = forms[form]
        assert list(each["losses"]) == ["0", "4", "8"]
        figures = ("final_loss", "exact_match", "on_bfloat16_loss", "on_bfloat16_exact_match", "above_bfloat16")
        assert all(len(each[figure]) == 2 for figure in figures)
        # Before the first step all forms are the same base, rounded otherwise; and each seed is another adapter.
        assert each["losses"]["0"] == pytest.approx(forms["float32"]["losses"]["0"], rel=0.01)
        assert each["losses"]["8"] == each["final_loss"] and each["final_loss"][0] != each["final_loss"][1]
        assert all(last < first for last, first in zip(each["final_loss"], each["losses"]["0"], strict=True))
    assert forms["bfloat16"]["above_bfloat16"] == [0.0, 0.0]
    # No two forms compute the same: each was really in use.
    assert len({forms[form]["final_loss"][0] for form in here}) == len(here)
    assert "| fp8 (numerics only) |" in done.stdout and "| loss at 4 |" in done.stdout
    assert not list(tmp_path.iterdir())
