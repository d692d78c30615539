"""On which devices of this machine a run has a process each: counted before it starts, and again before each restart."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from pantheraml.distributed.job import End, ending
from pantheraml.errors import DeviceError, PantheraError, RecipeError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Inventory
from pantheraml.hardware.find import find
from pantheraml.hardware.processes import read_processes
from pantheraml.hardware.select import select
from pantheraml.hardware.settings import read_settings
from pantheraml.planning.sharding import process_meshes
from pantheraml.recipe.kinds import KINDS, Kind, in_host_memory
from pantheraml.recipe.types import HardwareAsk

_ANSWER_S = 300.0
"""For torch to be imported from a slow disk, and each device to compute a little."""


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes of one start.

    Attributes:
        size: how many. kind: of their devices; None: not looked at. devices: the index of the device of each; none where they share one.
    """

    size: int
    kind: Kind | None = None
    devices: tuple[int, ...] = ()


def wanted_crew(ask: HardwareAsk, inventory: Inventory, left_out: Sequence[int] = ()) -> Crew:
    """The processes of this machine that a recipe asks for: one for each device.

    One where somebody has started them already, and where one process computes on all chips.

    Args:
        left_out: indices of devices that are not to be used. Of processes that share a device there are as many fewer.
    Raises: DeviceError for more devices than there are; RecipeError for settings that do not fit each other.
    """
    if read_processes().launched:
        return Crew(1)
    kind = select(inventory, ask)[0].kind
    if KINDS[kind].engine != "torch":
        return Crew(1, kind)
    shared = in_host_memory(kind)
    used = tuple(each for each in inventory.devices if each.kind != kind or shared or each.index not in left_out)
    inventory = replace(inventory, devices=used)
    device, _ = select(inventory, ask)
    meshes, _ = process_meshes(ask, device, inventory, collective=backend_of(device).collective)
    size = math.prod(meshes[0].values())
    if shared:
        return Crew(size - len(left_out), kind)
    indices = [each.index for each in used if each.kind == kind]
    return Crew(size, kind, tuple(indices[:size]) if size > 1 else (device.index,))


def count_crew(ask: HardwareAsk) -> Crew:
    """`wanted_crew` of what is here; one process also where the recipe cannot be followed, which a run then says."""
    axes = ask.dp * (ask.fsdp if isinstance(ask.fsdp, int) else 1) * ask.cp * ask.tp
    if read_processes().launched or (ask.devices in ("auto", 1) and axes == 1):
        return Crew(1)
    kind = read_settings().over(ask)[0].kind
    if kind in KINDS and KINDS[kind].engine != "torch":
        return Crew(1, kind)
    if kind in KINDS and in_host_memory(kind):  # one device, which as many processes share as are asked for
        return Crew(ask.devices if isinstance(ask.devices, int) else axes if ask.devices == "auto" else 1, kind)
    try:
        return look(ask)
    except PantheraError:
        return Crew(1)


def look(ask: HardwareAsk, left_out: Sequence[int] = ()) -> Crew:
    """`wanted_crew` of what is here, by another process.

    A driver holds memory of each device for each process that has touched it, and this one will only wait for the others.
    Raises: as `wanted_crew`; DeviceError if that process ends otherwise.
    """
    looking = [sys.executable, "-m", __name__, ask.model_dump_json(exclude_unset=True), json.dumps(left_out)]
    try:
        done = subprocess.run(looking, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_ANSWER_S)
        how, said = ending(done.returncode), done.stderr
    except subprocess.TimeoutExpired:
        done, how, said = None, f"no answer within {_ANSWER_S:.0f} s", ""
    if done is None or done.returncode:
        raise DeviceError(
            f"the devices could not be counted: the process that asked them ended with {how}",
            why=(said.strip().splitlines() or ["a driver that breaks takes the process with it"])[-1],
            fix="run pantheraml devices, and repair what does not answer",
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if "what" in answer:
        kind = RecipeError if answer["exit_code"] == RecipeError.exit_code else DeviceError
        raise kind(answer["what"], why=answer["why"], fix=answer["fix"])
    return Crew(answer["size"], answer["kind"], tuple(answer["devices"]))


class Elastic:
    """Which processes go on after the others have crashed: those whose devices answer, but for one that has ended the run twice.

    Args:
        ask: the recipe's; where it allows no fewer devices than it asks for, all go on.
        crew: of the first start. progress: something else after each new checkpoint.
    """

    def __init__(self, ask: HardwareAsk, crew: Crew, progress: Callable[[], object]) -> None:
        self._ask = ask if crew.kind is None else ask.model_copy(update={"kind": crew.kind})
        self._first, self._progress = crew.size, progress
        self._left_out: list[int] = []
        self._suspect: tuple[int, object] | None = None

    def after(self, end: End, crew: Crew) -> tuple[Crew, str]:
        """The next crew, and what is to be said of it.

        Raises: DeviceError if fewer devices answer than the recipe allows; RecipeError if its axes do not come to so many.
        """
        least = self._ask.least_devices
        if least is None:
            return crew, ""
        said, before = "", self._suspect
        self._suspect = None if end.rank is None else (crew.devices[end.rank] if crew.devices else end.rank, self._progress())
        if self._suspect is not None and self._suspect == before and crew.size > least:
            index, self._suspect = self._suspect[0], None
            self._left_out.append(index)
            who = f"The process of {crew.kind}:{index}" if crew.devices else f"Process {index}"
            said = f" {who} has ended the run twice without a new checkpoint in between, so it is left out."
        found = look(self._ask, self._left_out) if crew.devices else replace(crew, size=self._first - len(self._left_out))
        if found.size != crew.size:
            of = f"{found.size} of {self._first}"
            said += f" Going on with {of}." if said or not crew.devices else f" {of} devices answer; going on with {found.size}."
        return found, said


if __name__ == "__main__":  # what looks
    try:
        sought = find(HardwareAsk.model_validate_json(sys.argv[1]))
        answer = asdict(wanted_crew(sought.ask, sought.inventory, json.loads(sys.argv[2])))
    except PantheraError as error:
        answer = {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}
    sys.stdout.write(f"{json.dumps(answer)}\n")
