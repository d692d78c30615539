"""One run on two hosts, each a network namespace with a folder of its own: torchrun across them, and a link that is cut in the middle."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import chats, losses, tiny_recipe, written

from pantheraml.recipe.load import dump_recipe

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SOURCES = Path(__file__).parents[2] / "src"
STEPS, EVERY, TIMEOUT_S, PATIENCE_S = 160, 10, 10, 120
IP = shutil.which("ip", path="/usr/sbin:/usr/bin:/sbin:/bin")
FIRST = "10.77.0.1"


def ip(*words: str, check: bool = True) -> str:
    assert IP is not None
    return subprocess.run([IP, *words], capture_output=True, text=True, check=check).stdout


class Host:
    """A network namespace with one end of the cable, and a folder that the other host does not write to."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.space = f"pantheraml-{os.getpid()}-{rank}"
        self.link = f"pml{os.getpid()}{'ab'[rank]}"  # at most 15 letters
        folder.mkdir()

    def start(self, words: list[str]) -> subprocess.Popen[bytes]:
        """What it prints is in `said` of its folder."""
        assert IP is not None
        theirs = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        environment = {**theirs, "PYTHONPATH": str(SOURCES), "GLOO_SOCKET_IFNAME": self.link, "OMP_NUM_THREADS": "1"}
        with (self.folder / "said").open("wb") as said:
            command = [IP, "netns", "exec", self.space, *words]
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=said, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def cable(self, state: str) -> None:
        ip("netns", "exec", self.space, IP or "ip", "link", "set", self.link, state)

    def end_all(self) -> None:
        """Whatever still runs in the namespace; only this test has started anything there."""
        for number in ip("netns", "pids", self.space, check=False).split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if sys.platform != "linux" or os.geteuid() != 0 or IP is None:
        pytest.skip("network namespaces need root on Linux, and ip of iproute2")
    both = [Host(tmp_path / "first", 0), Host(tmp_path / "second", 1)]
    try:
        try:
            for host in both:
                ip("netns", "add", host.space)
            ip("link", "add", both[0].link, "netns", both[0].space, "type", "veth", "peer", "name", both[1].link, "netns", both[1].space)
            for host in both:
                inside = ("netns", "exec", host.space, IP)
                ip(*inside, "link", "set", "lo", "up")
                ip(*inside, "addr", "add", f"10.77.0.{host.rank + 1}/24", "dev", host.link)
                host.cable("up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        yield both
    finally:
        for host in both:
            host.end_all()
            ip("netns", "del", host.space, check=False)  # the cable goes with it


def documented() -> list[list[str]]:
    """The words of each host's command, as docs/distributed.md has them, for one process a host that meet at the first one of ours."""
    found = re.search(r"^```hosts\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    commands = []
    for line in found[1].splitlines():
        program, *words = line.split()
        assert program == "torchrun"
        words[words.index("--nproc-per-node") + 1] = "1"
        words[words.index("--master-addr") + 1] = FIRST
        commands.append([sys.executable, "-m", "torch.distributed.run", *words])
    return commands


def ended(hosts: list[Host], processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """(exit code of torchrun, what was printed) of each."""
    until = time.monotonic() + PATIENCE_S
    try:
        codes = [each.wait(timeout=max(1.0, until - time.monotonic())) for each in processes]
    finally:
        for host in hosts:
            host.end_all()
        for each in processes:
            each.wait(timeout=10)
    return [(code, host.said()) for code, host in zip(codes, hosts, strict=True)]


def explained(said: str) -> bool:
    """Three lines of an error that says that the other host is not heard any more."""
    lines = said.splitlines()
    at = next((n for n, line in enumerate(lines) if line.startswith("error: ")), None)
    if at is None:
        return False
    what, why, fix = lines[at : at + 3]
    return ("did not come within" in what or "broke off" in what) and why.startswith("  why: ") and "--resume" in fix


@pytest.mark.slow
def test_a_cut_between_two_hosts_ends_both_with_words_and_the_same_command_goes_on(hosts: list[Host]) -> None:
    sections: dict[str, Any] = {
        "optim": {"steps": STEPS},
        "eval": {"every": STEPS, "generate_rows": 0},
        "hardware": {"timeout_s": TIMEOUT_S},
    }
    asked = tiny_recipe(Path("runs"), "rows.jsonl", **sections)
    asked = asked.model_copy(update={"run": asked.run.model_copy(update={"save_every": EVERY, "log_every": EVERY})})
    for host in hosts:
        written(host.folder / "rows.jsonl", chats(40))
        (host.folder / "recipe.yaml").write_text(dump_recipe(asked))
    run = hosts[0].folder / "runs" / "run"

    processes = [host.start(words) for host, words in zip(hosts, documented(), strict=True)]
    until = time.monotonic() + PATIENCE_S
    while not (run / "checkpoints" / f"step-{EVERY:08}").exists() and time.monotonic() < until and processes[0].poll() is None:
        time.sleep(0.02)
    hosts[0].cable("down")
    cut = time.monotonic()
    found = ended(hosts, processes)
    took_s = time.monotonic() - cut
    assert [code for code, _ in found] == [1, 1], found  # torchrun's own; those of the processes stand in what it prints
    for _, said in found:
        assert explained(said), said
        code = re.search(r"exitcode *: (\d+)", said)
        assert code is not None and int(code[1]) in (4, 76), said
    assert took_s < 4 * TIMEOUT_S + 20, took_s
    done = max(int(place.name.partition("-")[2]) for place in (run / "checkpoints").iterdir() if place.name.startswith("step-"))
    assert EVERY <= done < STEPS

    hosts[0].cable("up")
    found = ended(hosts, [host.start(words) for host, words in zip(hosts, documented(), strict=True)])
    assert [code for code, _ in found] == [0, 0], found
    assert f"Going on after step {done}" in found[0][1] and "Going on" not in found[1][1]
    assert len(losses(run)) == STEPS
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert not (hosts[1].folder / "runs").exists()  # the first host alone keeps a folder
