"""One process for each device of this machine: started together, and started again where that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pantheraml.distributed.crew import Crew, Elastic
from pantheraml.distributed.job import RESUME, Asked, Job
from pantheraml.distributed.listening import listening
from pantheraml.errors import PantheraError, StorageError


def launch(
    command: Sequence[str],
    *,
    crew: Crew,
    folder: Path,
    restarts: int,
    hang_s: float,
    announce: Callable[[str], None],
    environment: Mapping[str, str],
    elastic: Elastic | None = None,
) -> int:
    """Start a command in so many processes, wait for all of them, and give their exit code.

    SIGTERM and SIGINT are passed on to all. If one fails, the others are ended. What the first one prints is seen, what the others print
    is kept in the folder, and so are the stacks of those that are ended while they run.

    Args:
        command: a program and its words. It calls `attend` first, and beats a `Heartbeat` at each step; see heartbeat.py.
        folder: for logs and signs of life. environment: what the processes get, besides what tells them who they are.
        restarts: how often all are started again, with `--resume`, after one has crashed, hung, or lost its device.
        elastic: says who is; None: all are.
        hang_s: a process that has given signs of life is taken for dead after so long without one.
        announce: hears what happens, in sentences.
    Returns: 0; 75 or 130 if they have stopped with a checkpoint; that of the error which one of them has explained.
    Raises: DeviceError if one crashed or hung: which one, how, and where its log is; StorageError if there is no folder for that; what
        `Elastic.after` raises.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made: {error.strerror or error}",
            why="the processes of the run print into files there",
            fix="set run.folder to a folder that you may write to, or correct its permissions",
        ) from error
    words, left, asked = list(command), restarts, Asked()
    announce(f"Starting {crew.size} processes; what all but the first print is kept in {folder}/rank-*.log.")
    with listening(asked.note):
        while True:
            with Job(words, crew.size, folder, environment, crew.devices) as job:
                end = job.watched(hang_s, asked)
            if not end.again or not left or asked.numbers:
                break
            left -= 1
            try:
                crew, changed = elastic.after(end, crew) if elastic else (crew, "")
            except PantheraError:
                announce(f"{end.said}.{end.tail}")
                raise
            announce(f"{end.said}.{end.tail}\nAll are started again from the last checkpoint ({restarts - left} of {restarts}).{changed}")
            words += [] if RESUME in words else [RESUME]
    if end.error:
        raise end.error
    if end.tail:
        announce(f"{end.said}.{end.tail}")
    return end.code
