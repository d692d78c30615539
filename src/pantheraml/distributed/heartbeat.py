"""What a process that our launcher has started shows it: that it lives, and on request its stacks; and that it ends when the launcher does."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path

from pantheraml.hardware.processes import read_processes

GRACE_S = 20.0
"""Between the request to end and the end by force."""


class Heartbeat:
    """Signs of life of a process, for the launcher: after the first one the next must come within its `hang_s`.

    Args:
        folder: where the launcher looks for it; None: nobody does.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.beats = 0
        self._file = None if folder is None else alive_file(folder, rank).open("wb", buffering=0)

    def beat(self) -> None:
        """One more; as cheap as a write of a few bytes."""
        self.beats += 1
        if self._file:
            os.pwrite(self._file.fileno(), b"%d" % self.beats, 0)

    def rest(self) -> None:
        """No beat is expected until the next one: for what takes as long as it takes, such as an export."""
        if self._file:
            os.ftruncate(self._file.fileno(), 0)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        if self._file:
            self._file.close()
            self._file = None


def open_heartbeat() -> Heartbeat:
    """That of this process, silent if our launcher has not started it."""
    said = read_processes()
    return Heartbeat(said.signs, said.rank)


_stacks: list[object] = []
"""Files that faulthandler writes to; it keeps no hold of them."""


def attend() -> None:
    """What a process that our launcher has started does first: it shows its stacks on request, and ends when the launcher does."""
    said = read_processes()
    if said.launcher is None or said.logs is None or said.signs is None:
        return
    descriptor, _, inode = said.launcher.partition(":")
    pipe = int(descriptor)
    try:
        mine = os.fstat(pipe).st_ino == int(inode)
    except OSError:
        mine = False
    if not mine:  # a program that such a process has started: the variables are there, and the pipe is not
        return
    os.set_inheritable(pipe, False)
    stacks = log_file(said.logs, said.rank).open("a")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    _stacks.append(stacks)
    alive_file(said.signs, said.rank).touch()
    threading.Thread(target=_follow, args=(pipe,), name="launcher", daemon=True).start()


def _follow(pipe: int) -> None:
    os.read(pipe, 1)  # nothing ever comes; it returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def alive_file(folder: Path, rank: int) -> Path:
    """Where a process leaves signs of life: there once it has attended, empty while no beat is expected, or how many there were."""
    return folder / f"alive-{rank:05}"


def log_file(folder: Path, rank: int) -> Path:
    """What a process prints, but for the first one's, and its stacks."""
    return folder / f"rank-{rank:05}.log"


def lost_file(folder: Path) -> Path:
    """Where the launcher says which process is lost, and why, when it ends the others: they may be waiting for it."""
    return folder / "lost"
