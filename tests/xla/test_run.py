"""Whole runs on a simulated TPU: the same main path, report and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import chats, losses, quiet, tiny_recipe, written

from pantheraml.errors import DeviceError
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.evaluate import evaluate
from pantheraml.trainer.run import train

SIMULATED = {"kind": "tpu", "simulate_tpu": True, "threads": 1}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return written(tmp_path / "rows.jsonl", chats(40))


def recipe(folder: Path, rows: str, **hardware: object) -> Recipe:
    return tiny_recipe(folder, rows, hardware={**SIMULATED, **hardware}, optim={"steps": 4, "warmup": 0.0}, eval={"every": 4})


@pytest.mark.slow
def test_a_run_learns_what_it_learns_on_a_cpu_and_says_that_it_is_simulated(tmp_path: Path, rows: str) -> None:
    console, printed = quiet()
    run = train(recipe(tmp_path / "tpu", rows, devices=4, tp=2), console=console)
    report = json.loads((run.folder / "report.json").read_text())
    assert report["device"]["simulated"] is True
    assert "(simulated)" in (run.folder / "report.md").read_text()
    assert json.loads((run.folder / "plan.json").read_text())["mesh"] == {"fsdp": 2, "tp": 2}
    on_cpu = tiny_recipe(tmp_path / "cpu", rows, optim={"steps": 4, "warmup": 0.0}, eval={"every": 4})
    expected = losses(train(on_cpu, console=console).folder)
    assert losses(run.folder) == pytest.approx(expected, abs=1e-4)
    assert run.chat("what is 3 times 3?") is not None  # the adapter that was saved is loaded again, by torch
    assert "held-out loss" in printed()


@pytest.mark.slow
def test_a_run_with_a_base_in_eight_bits_is_evaluated_again(tmp_path: Path, rows: str) -> None:
    console, _ = quiet()
    asked = recipe(tmp_path, rows)
    run = train(asked.model_copy(update={"model": asked.model.model_copy(update={"load_in_8bit": True})}), console=console)
    again = evaluate(run.recipe, run.loaded)
    report = json.loads((run.folder / "report.json").read_text())
    assert json.loads((run.folder / "plan.json").read_text())["quantizer"] == "int8"
    assert again["loss"] == pytest.approx(report["eval"]["loss_after"], abs=0.01)  # the base is whole now


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pantheraml.trainer.checkpoint import Checkpoints

    console, _ = quiet()
    whole = train(recipe(tmp_path / "whole", rows), console=console)
    save = Checkpoints.save

    def then_stop(self: Checkpoints, step: int, *args: object, **how: object) -> object:
        kept = save(self, step, *args, **how)
        raise KeyboardInterrupt if step == 2 else AssertionError(kept)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path / "cut", rows), console=console)
    resumed = train(recipe(tmp_path / "cut", rows), console=console, resume=True)
    adapters = [(run.folder / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_more_devices_than_jax_started_with_are_refused(tmp_path: Path, rows: str) -> None:
    console, _ = quiet()
    with pytest.raises(DeviceError, match="16 devices were asked for"):
        train(recipe(tmp_path, rows, devices=16), console=console)
