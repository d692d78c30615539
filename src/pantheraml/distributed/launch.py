"""One process for each device of this machine: counted, started together, and started again where that was asked for."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pantheraml.distributed.job import RESUME, Asked, Job
from pantheraml.errors import StorageError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Inventory
from pantheraml.hardware.find import find
from pantheraml.hardware.processes import read_processes
from pantheraml.hardware.select import select
from pantheraml.hardware.settings import read_settings
from pantheraml.planning.sharding import process_meshes
from pantheraml.recipe.kinds import KINDS, in_host_memory
from pantheraml.recipe.types import HardwareAsk


def wanted_processes(ask: HardwareAsk, inventory: Inventory) -> int:
    """How many processes of this machine a recipe asks for: one for each device.

    1 where somebody has started them already, and where one process computes on all chips.
    Raises: DeviceError for more devices than there are; RecipeError for settings that do not fit each other.
    """
    if read_processes().launched:
        return 1
    device, _ = select(inventory, ask)
    if KINDS[device.kind].engine != "torch":
        return 1
    meshes, _ = process_meshes(ask, device, inventory, collective=backend_of(device).collective)
    return math.prod(meshes[0].values())


def count_processes(ask: HardwareAsk) -> int:
    """`wanted_processes` of what is here; 1 also where the recipe cannot be followed, which a run then says.

    A driver holds memory of each device for each process that has touched it, and this one will only wait for the others: so it is
    another one that looks.
    """
    axes = ask.dp * (ask.fsdp if isinstance(ask.fsdp, int) else 1) * ask.tp
    if read_processes().launched or (ask.devices in ("auto", 1) and axes == 1):
        return 1
    kind = read_settings().over(ask)[0].kind
    if kind in KINDS and KINDS[kind].engine != "torch":
        return 1
    if kind in KINDS and in_host_memory(kind):  # one device, which as many processes share as are asked for
        return ask.devices if isinstance(ask.devices, int) else axes if ask.devices == "auto" else 1
    looking = [sys.executable, "-m", __name__, ask.model_dump_json(exclude_unset=True)]
    said = subprocess.run(looking, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return int(said.stdout.split()[-1]) if said.returncode == 0 else 1


def launch(
    command: Sequence[str],
    *,
    processes: int,
    folder: Path,
    restarts: int,
    hang_s: float,
    announce: Callable[[str], None],
    environment: Mapping[str, str],
) -> int:
    """Start a command in so many processes, wait for all of them, and give their exit code.

    SIGTERM and SIGINT are passed on to all. If one fails, the others are ended. What the first one prints is seen, what the others print
    is kept in the folder, and so are the stacks of those that are ended while they run.

    Args:
        command: a program and its words. It calls `attend` first, and beats a `Heartbeat` at each step; see heartbeat.py.
        folder: for logs and signs of life. environment: what the processes get, besides what tells them who they are.
        restarts: how often all are started again, with `--resume`, after one has crashed, hung, or lost its device.
        hang_s: a process that has given signs of life is taken for dead after so long without one.
        announce: hears what happens, in sentences.
    Returns: 0; 75 or 130 if they have stopped with a checkpoint; that of the error which one of them has explained.
    Raises: DeviceError if one crashed or hung: which one, how, and where its log is; StorageError if there is no folder for that.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made: {error.strerror or error}",
            why="the processes of the run print into files there",
            fix="set run.folder to a folder that you may write to, or correct its permissions",
        ) from error
    words, left = list(command), restarts
    announce(f"Starting {processes} processes; what all but the first print is kept in {folder}/rank-*.log.")
    with _listening() as asked:
        while True:
            with Job(words, processes, folder, environment) as job:
                end = job.watched(hang_s, asked)
            if not end.again or not left or asked.numbers:
                break
            left -= 1
            announce(f"{end.said}.{end.tail}\nAll are started again from the last checkpoint ({restarts - left} of {restarts}).")
            words += [] if RESUME in words else [RESUME]
    if end.error:
        raise end.error
    if end.tail:
        announce(f"{end.said}.{end.tail}")
    return end.code


@contextmanager
def _listening() -> Iterator[Asked]:
    """Within the block SIGTERM and SIGINT are for the job. Only the main thread can listen."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.waiting.append(number)
        asked.numbers.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":  # what looks, for `count_processes`
    sought = find(HardwareAsk.model_validate_json(sys.argv[1]))
    sys.stdout.write(f"{wanted_processes(sought.ask, sought.inventory)}\n")
