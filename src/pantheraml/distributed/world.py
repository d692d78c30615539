"""The processes that work on one run, for each host of a TPU or for each other device; usually there is one. The first of them keeps the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.device import Device
from pantheraml.hardware.processes import read_processes
from pantheraml.recipe.kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor


class World(Protocol):
    """All processes call the same methods in the same order.

    Attributes:
        rank: of this process, from 0. size: how many there are. called: what one of them is to people.
    """

    rank: int
    size: int
    called: str

    def gathered(self, text: str) -> list[str]:
        """What each process gave, by rank. Raises: DeviceError if one of them has given up."""
        ...

    def give_up(self, why: str) -> None:
        """This process goes no further: the others hear so where they next meet it."""
        ...

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that the first process has. The others give tensors of the same names, shapes and dtypes."""
        ...


class Alone:
    """A `World` of one process."""

    rank = 0
    size = 1
    called = "process"

    def gathered(self, text: str) -> list[str]:
        """See `World.gathered`."""
        return [text]

    def give_up(self, why: str) -> None:
        """See `World.give_up`."""

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `World.shared`."""
        return dict(tensors)


def open_world(device: Device, announce: Callable[[str], None], timeout_s: float = 600.0) -> World:
    """The processes of a run on this device; where there are several, this waits until all of them have come.

    Args:
        announce: hears that it waits. timeout_s: how long one that computes by torch may let the others wait.
    Raises: DeviceError if they do not come.
    """
    if KINDS[device.kind].engine == "xla":
        if device.hosts == 1:
            return Alone()
        from pantheraml.hardware.xla_world import join

        return join(device, announce, partial(gave_up, called="host"))
    if read_processes().world_size == 1:
        return Alone()
    from pantheraml.distributed.torch_world import join_processes

    return join_processes(device, announce, gave_up, timeout_s)


def told(world: World, say: Callable[[], Any]) -> Any:
    """What the first process says, as JSON can hold it. What it raises, all raise."""
    with stopping(world):
        answer = say() if world.rank == 0 else None
    return json.loads(world.gathered(json.dumps(answer))[0])


def most(world: World, number: int) -> int:
    """The largest of the numbers that the processes have."""
    return max(int(each) for each in world.gathered(str(number)))


@contextmanager
def together(world: World) -> Iterator[None]:
    """When the block has ended here, it has in each process. Raises: DeviceError if one of them has given up."""
    with stopping(world):
        yield
    world.gathered("")


@contextmanager
def stopping(world: World) -> Iterator[None]:
    """What is raised in the block, the other processes hear of."""
    try:
        yield
    except BaseException as error:  # also an interrupt; it is raised again
        world.give_up(error.what if isinstance(error, PantheraError) else repr(error))
        raise


def gave_up(rank: int, size: int, why: str, called: str = "process") -> DeviceError:
    """The error of the others. called: see `World`."""
    return DeviceError(
        f"{called} {rank} of {size} has stopped: {why}",
        why="all of them work on the same steps",
        fix="see what it printed; correct it, and start all of them again, with --resume where there are checkpoints",
    )
