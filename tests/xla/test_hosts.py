"""One run on two hosts: two processes with a folder each, that meet through JAX and share the simulated chips of a slice."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.tiny import chats, losses, quiet, tiny_recipe, written

from pantheraml.recipe.load import dump_recipe
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.run import train

STEPS = 40
HARDWARE = {"kind": "tpu", "simulate_tpu": True, "threads": 1, "devices": 4, "dcn": 2}


def recipe(folder: Path, rows: str) -> Recipe:
    # A row for each example and each device, so that every host takes part in every gradient.
    sections = {"hardware": HARDWARE, "optim": {"steps": STEPS, "warmup": 0.0}, "eval": {"every": STEPS}}
    data = {"train": rows, "eval_fraction": 0.1, "packing": "off"}
    asked = tiny_recipe(folder, rows, data=data, batch={"size": 8, "micro_tokens": 1024}, **sections)
    return asked.model_copy(update={"run": asked.run.model_copy(update={"name": "run", "log_every": 2, "save_every": 4})})


def documented() -> list[list[str]]:
    """The words of each host's command, as docs/tpu.md has them."""
    page = (Path(__file__).parents[2] / "docs" / "tpu.md").read_text("utf-8")
    found = re.search(r"^```hosts\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return [line.split() for line in found[1].splitlines()]


def started(folders: list[Path]) -> list[subprocess.Popen[bytes]]:
    """The documented command on each host; what it prints is in `said` of its folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PANTHERAML_CACHE": str(folders[0].parent / "cache")}
    processes = []
    for folder, line in zip(folders, documented(), strict=True):
        given = dict(word.split("=") for word in line[:-4])
        given["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        command = [sys.executable, "-m", *line[-4:]]
        with (folder / "said").open("wb") as said:
            processes.append(subprocess.Popen(command, cwd=folder, env={**shared, **given}, stdout=said, stderr=subprocess.STDOUT))
    return processes


def ended(folders: list[Path], processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each."""
    try:
        codes = [each.wait(timeout=240) for each in processes]
    finally:
        for each in processes:
            each.kill()
    return [(code, (folder / "said").read_text()) for code, folder in zip(codes, folders, strict=True)]


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    """Two folders with the same recipe and the same rows."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        written(folder / "rows.jsonl", chats(40))
        (folder / "recipe.yaml").write_text(dump_recipe(recipe(Path("runs"), "rows.jsonl")))
    return folders


@pytest.mark.slow
def test_two_hosts_take_the_steps_of_one_also_when_one_of_them_was_asked_to_stop(hosts: list[Path], tmp_path: Path) -> None:
    processes = started(hosts)
    first = hosts[0] / "runs" / "run"
    until = time.monotonic() + 240
    while not (first / "checkpoints" / "step-00000004").exists() and time.monotonic() < until and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    found = ended(hosts, processes)
    assert [code for code, _ in found] == [75, 75], found
    done = max(int(place.name.partition("-")[2]) for place in (first / "checkpoints").iterdir())
    assert 4 <= done < STEPS
    assert not (hosts[1] / "runs").exists()  # the first host alone keeps a folder

    found = ended(hosts, started(hosts))
    assert [code for code, _ in found] == [0, 0], found
    assert f"Going on after step {done}" in found[0][1] and "Going on" not in found[1][1]
    assert json.loads((first / "plan.json").read_text())["mesh"] == {"dcn": 2, "fsdp": 2}

    console, _ = quiet()
    alone = train(recipe(tmp_path / "alone", str(hosts[0] / "rows.jsonl")), console=console)
    assert losses(first) == pytest.approx(losses(alone.folder), abs=1e-5)
    assert len(losses(first)) == STEPS
    found, expected = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (first, alone.folder))
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-4
    assert max(float(tensor.abs().max()) for name, tensor in found.items() if "lora_B" in name) > 1e-3  # which began at 0
