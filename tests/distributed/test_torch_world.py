"""The world of torch.distributed: real processes that meet, share, give up, are missed, and die."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.fakes import fake_device

from pantheraml.distributed.torch_world import ANOTHER_GAVE_UP, join_processes
from pantheraml.distributed.world import gave_up
from pantheraml.errors import DeviceError

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, signal, sys, time
import torch
from tests.distributed.test_torch_world import values
from tests.fakes import fake_device
from pantheraml.distributed.torch_world import join_processes
from pantheraml.distributed.world import gave_up, stopping, together, told
from pantheraml.errors import PantheraError

rank = int(os.environ["RANK"])

def join(timeout_s=60.0):
    return join_processes(fake_device("cpu"), print, gave_up, timeout_s)

def ended(error):
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def values() -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes."""
    drawn = torch.Generator().manual_seed(7)
    wide = torch.randn(6, 5, generator=drawn)
    return {
        "float32": wide,
        "turned": wide.T,  # not contiguous
        "float64": wide.double() / 3,
        "bfloat16": wide.bfloat16(),
        "float16": wide.half(),
        "float8": wide.to(torch.float8_e4m3fn),
        "int64": torch.arange(2**40, 2**40 + 5),
        "bool": wide > 0,
        "number": torch.tensor(1.5),
        "small number": torch.tensor(-2.0, dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 3),
    }


def run(program: str, size: int = 2, attempts: tuple[int, ...] = (), timeout_s: float = 120) -> list[tuple[int, str]]:
    """The program in so many processes: (exit code, what it printed), by rank. attempts: as torchrun has counted them on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        said["TORCHELASTIC_RESTART_COUNT"] = attempts[rank] if attempts else 0
        given = {name: str(value) for name, value in said.items()}
        environment = {**os.environ, **given, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        words = [sys.executable, "-c", PRELUDE + textwrap.dedent(program)]
        started.append(
            subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        # Who waits for its standard input is let go when the others have ended.
        printed = [process.communicate(timeout=timeout_s)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


def test_processes_hear_each_other_share_values_and_can_meet_again() -> None:
    done = run("""
        world = join()
        assert join() is world and (world.rank, world.size) == (rank, 3)
        for number in range(30):
            assert world.gathered(f"é {number} {rank}" if rank else "") == ["", f"é {number} 1", f"é {number} 2"]
        with together(world):
            pass
        assert told(world, lambda: {"step": 3}) == {"step": 3}
        kept = world._store.num_keys()
        for _ in range(30):
            world.gathered("x")
        assert world._store.num_keys() < kept + 10  # what was said is cleared away: 150 otherwise
        want = values()
        like = want if rank == 0 else {name: torch.ones(value.shape, dtype=value.dtype) for name, value in want.items()}
        found = world.shared(like)
        assert list(found) == list(want)
        for name, value in want.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            assert torch.equal(found[name].float(), value.float()), name
        world.leave()
        again = join()
        assert again is not world and again.gathered(str(rank)) == ["0", "1", "2"]
        x = torch.ones(2)
        torch.distributed.all_reduce(x)
        assert x.tolist() == [3, 3]
        print("through")
    """, size=3)  # fmt: skip
    for code, printed in done:
        assert code == 0 and printed.endswith("through\n"), printed
        assert "Waiting for 3 processes to meet at 127.0.0.1:" in printed


def test_a_machine_that_has_come_later_and_counts_its_attempts_from_0_finds_the_others() -> None:
    """torchrun keeps that number on each machine for itself."""
    done = run("""
        world = join()
        assert world.gathered(str(rank)) == ["0", "1"]
        print("through")
    """, attempts=(2, 0))  # fmt: skip
    for code, printed in done:
        assert code == 0 and printed.endswith("through\n"), printed


@pytest.mark.parametrize("giver", [0, 1])
def test_one_that_gives_up_is_heard_of_with_its_reason(giver: int) -> None:
    done = run(f"""
        world = join()
        try:
            with stopping(world):
                if rank == {giver}:
                    raise PantheraError("row 7 cannot be read", why="it is torn", fix="mend it")
                world.gathered("waiting")
        except PantheraError as error:
            ended(error)
    """)
    code, printed = done[giver]
    assert code == 1 and "why: it is torn" in printed
    code, printed = done[1 - giver]
    assert code == ANOTHER_GAVE_UP and f"{giver} of 2 has stopped: row 7 cannot be read" in printed


def test_one_that_does_not_come_is_named() -> None:
    done = run("""
        world = join()
        if rank == 1:
            sys.stdin.read()  # for ever: nobody closes it before the end of the test
        world.timeout_s = 1.0
        try:
            world.gathered("")
        except PantheraError as error:
            print(error, flush=True)
            os._exit(error.exit_code)
    """)
    code, printed = done[0]
    assert code == 4 and "process 1 of 2 did not come within 1 s" in printed and "hardware.timeout_s" in printed


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_one_does_not_hold_up_the_other(dead: int) -> None:
    done = run(f"""
        world = join()
        try:
            world.gathered("")  # the dead one may be gone before the other one has read this
            if rank == {dead}:
                os.kill(os.getpid(), signal.SIGKILL)
            world.timeout_s = 2.0
            world.shared(values())
        except PantheraError as error:
            ended(error)
    """)
    assert done[dead][0] == -9
    code, printed = done[1 - dead]
    if dead == 0:  # the store was its own
        assert code == ANOTHER_GAVE_UP and "the connection between the 2 processes broke off" in printed
    else:
        assert code == 4 and "process 1 of 2 did not come within 2 s" in printed


def test_an_interrupt_is_heard_while_waiting_and_told_to_the_others() -> None:
    done = run("""
        import threading
        signal.signal(signal.SIGINT, signal.default_int_handler)
        world = join()
        world.gathered("")
        if rank == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(1)
        try:
            with stopping(world):
                world.gathered("")
                if rank == 0:  # the interrupted one had said its word
                    world.gathered("")
        except PantheraError as error:
            ended(error)
    """)
    assert done[1][0] == -2 or "KeyboardInterrupt" in done[1][1]
    code, printed = done[0]
    assert code == ANOTHER_GAVE_UP and "1 of 2 has stopped: KeyboardInterrupt()" in printed


def test_a_group_that_the_program_has_made_is_used() -> None:
    done = run("""
        torch.distributed.init_process_group("gloo")
        world = join()
        assert (world.rank, world.size) == (rank, 2)
        want = values()
        found = world.shared(want if rank == 0 else {name: torch.zeros_like(value) for name, value in want.items()})
        assert torch.equal(found["int64"], want["int64"])
        world.leave()
        assert torch.distributed.is_initialized()  # whoever made it closes it
        torch.distributed.destroy_process_group()
        print("through")
    """)
    for code, printed in done:
        assert code == 0 and printed.endswith("through\n"), printed


def test_where_nobody_listens_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DeviceError, match=r"nobody listened at 127.0.0.1:\d+ within 0 s"):
            join_processes(fake_device("cpu"), lambda said: None, gave_up, 0.1)


def test_devices_that_torch_cannot_connect_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match="2 processes cannot work together on mps:0"):
        join_processes(fake_device("mps"), lambda said: None, gave_up, 1.0)
    if not torch.distributed.is_nccl_available():
        with pytest.raises(DeviceError, match="this build of torch has no nccl"):
            join_processes(fake_device("cuda"), lambda said: None, gave_up, 1.0)
