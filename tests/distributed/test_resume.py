"""A divided run through the command line: what two processes save, one, two and four go on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import chats, losses, tiny_recipe, written

from pantheraml.recipe.load import dump_recipe, load_recipe

HALF, ALL = 3, 6


def trained(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml", *words, str(folder)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def largest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
def test_what_two_processes_save_any_number_goes_on_with(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", chats(40))
    recipe = tiny_recipe(
        tmp_path,
        rows,
        adapter={"kind": "full"},
        batch={"size": 6},
        optim={"steps": ALL, "lr": 1e-4},
        eval={"every": HALF, "generate_rows": 1},
        run={"name": "two", "save_every": HALF},
        hardware={"devices": 2, "parallel": "fsdp"},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    said = trained(tmp_path / "recipe.yaml", "train")
    assert "fsdp 2" in said and "2 processes" in said
    whole = tmp_path / "two"
    assert (whole / "logs" / "rank-00001.log").exists()
    assert {place.name for place in (whole / "checkpoints" / f"step-{ALL:08d}").iterdir()} >= {
        "pieces-00000.safetensors",
        "pieces-00001.safetensors",
    }
    weights, curve = load_file(whole / "model" / "model.safetensors"), losses(whole)
    assert len(curve) == ALL

    for processes in (1, 2, 4):
        again = tmp_path / f"on{processes}"
        shutil.copytree(whole, again)
        for left in ("model", f"checkpoints/step-{ALL:08d}", "logs"):
            shutil.rmtree(again / left)
        for report in again.glob("report.*"):
            report.unlink()
        hardware = {"devices": processes, "parallel": "fsdp" if processes > 1 else "auto"}
        asked = load_recipe(again / "recipe.yaml")
        (again / "recipe.yaml").write_text(dump_recipe(asked.model_copy(update={"hardware": asked.hardware.model_copy(update=hardware)})))
        said = trained(again, "resume")
        assert f"Going on after step {HALF} of {ALL}" in said
        if processes == 2:
            assert losses(again) == curve
            assert largest(weights, load_file(again / "model" / "model.safetensors")) == 0
        else:  # sums in another order
            assert losses(again) == pytest.approx(curve, rel=1e-6)
            assert largest(weights, load_file(again / "model" / "model.safetensors")) < 1e-5


@pytest.mark.slow
def test_a_base_in_eight_bits_goes_with_copies_and_is_refused_in_parts(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", chats(40))
    recipe = tiny_recipe(tmp_path, rows, hardware={"devices": 2, "dp": 2})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_8bit": True})})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    said = trained(tmp_path / "recipe.yaml", "train")
    assert "dp 2" in said
    divided = recipe.hardware.model_copy(update={"dp": 1, "parallel": "fsdp"})
    (tmp_path / "recipe.yaml").write_text(
        dump_recipe(recipe.model_copy(update={"hardware": divided, "run": recipe.run.model_copy(update={"name": "other"})}))
    )
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml", "train", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode and "int8" in done.stderr and "fix:" in done.stderr


@pytest.mark.slow
def test_the_best_weights_are_those_that_are_measured_at_the_end(tmp_path: Path) -> None:
    """FSDP keeps what it has brought after an evaluation; the weights of the best step must come in their place."""
    rows = written(tmp_path / "rows.jsonl", chats(40))
    # A rate at which the last evaluation is worse than one before it.
    optim = {"steps": ALL, "lr": 5e-2, "schedule": "constant"}
    sections = {
        "eval": {"every": 1, "generate_rows": 1},
        "run": {"save_every": 1, "keep": ALL},
        "hardware": {"devices": 2, "parallel": "fsdp"},
    }
    recipe = tiny_recipe(tmp_path, rows, adapter={"kind": "full"}, optim=optim, **sections)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    trained(tmp_path / "recipe.yaml", "train")
    measured = losses(tmp_path / "run", "eval_loss")
    assert min(measured) < measured[-1] - 0.01
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["eval"]["loss_after"] == pytest.approx(min(measured), rel=1e-6)


@pytest.mark.slow
def test_a_model_that_keeps_its_own_head_is_divided_as_well(tmp_path: Path) -> None:
    """An adapter on the head: the loss comes from the model's own forward, and PEFT would save a head that no process has."""
    rows = written(tmp_path / "rows.jsonl", chats(40))
    adapter = {"kind": "lora", "rank": 4, "targets": ["lm_head", "q_proj"]}
    for name, hardware in (("one", {}), ("two", {"devices": 2, "parallel": "fsdp"})):
        recipe = tiny_recipe(tmp_path, rows, adapter=adapter, eval={"generate_rows": 0}, run={"name": name}, hardware=hardware)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        trained(tmp_path / "recipe.yaml", "train")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    adapters = {name: value for name, value in one.items() if "lora_" in name}
    assert largest(adapters, two) < 1e-5
