"""torchrun with fewer machines than it began with: two agents on this one, of which one is killed, and what the other one comes to."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.tiny import chats, losses, tiny_recipe, written

from pantheraml.recipe.load import dump_recipe

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SOURCES = Path(__file__).parents[2] / "src"
STEPS, EVERY, PATIENCE_S = 150, 10, 200
SOON = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"
"""torchrun waits 30 s for machines that may still come, and takes one for dead after 15 s."""


def documented(port: int) -> tuple[dict[str, str], list[str]]:
    """(variables, words) of the command in docs/distributed.md, for agents of one process each that meet here."""
    found = re.search(r"^```hosts\n(.*--nnodes 1:2.*)\n```$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert found is not None
    words = shlex.split(found[1])
    variables = dict(words.pop(0).split("=") for _ in range(words.index("torchrun")))
    assert words.pop(0) == "torchrun"
    words[words.index("--nproc-per-node") + 1] = "1"
    words[words.index("--rdzv-endpoint") + 1] = f"localhost:{port}"
    return variables, words


def agent(folder: Path, port: int, *, first: bool) -> subprocess.Popen[bytes]:
    """What it and its process print is in `said-first` or `said-second`."""
    variables, words = documented(port)
    theirs = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    environment = {**theirs, **variables, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--rdzv-conf={SOON},is_host={int(first)}", *words]
    with (folder / f"said-{'first' if first else 'second'}").open("wb") as said:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)


def kill(agent: subprocess.Popen[bytes]) -> list[int]:
    """The agent and what it has started, which does not end with it."""
    with suppress(psutil.NoSuchProcess):
        all_of_it = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
        for each in all_of_it:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        agent.wait(timeout=10)
        return [each.pid for each in all_of_it]
    return []


@pytest.mark.slow
def test_the_machine_that_is_left_goes_on_alone(tmp_path: Path) -> None:
    asked = tiny_recipe(
        Path("runs"),
        written(tmp_path / "rows.jsonl", chats(40)),
        optim={"steps": STEPS},
        eval={"every": STEPS, "generate_rows": 0},
        run={"save_every": EVERY, "log_every": EVERY},
        hardware={"timeout_s": 60},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(asked))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "runs" / "run"
    first = agent(tmp_path, port, first=True)
    second = agent(tmp_path, port, first=False)
    try:
        until = time.monotonic() + PATIENCE_S
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < until and first.poll() is None:
            time.sleep(0.02)
        killed = kill(second)
        code = first.wait(timeout=max(1.0, until - time.monotonic()))
    finally:
        kill(first)
        kill(second)
    said = (tmp_path / "said-first").read_text(errors="replace")
    assert killed and code == 0, said
    assert "Waiting for 2 processes to meet" in said and "the connection between the 2 processes broke off" in said
    assert "From here on with mesh={}, world_size=1" in said
    done = re.search(rf"Going on after step (\d+) of {STEPS}", said)
    assert done is not None and EVERY <= int(done[1]) < STEPS
    assert len(losses(run)) == STEPS
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
