"""The processes of torch.distributed brought together: words go through its store, tensors through its groups."""

from __future__ import annotations

import atexit
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pantheraml.distributed.heartbeat import lost_file
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.device import Device
from pantheraml.hardware.processes import Processes, read_processes
from pantheraml.recipe.kinds import in_host_memory

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

ANOTHER_GAVE_UP = 76
"""Exit code of a process that ends only because it heard that another one has. Our launcher reports the other one's."""
LEAVE_S = 5.0
"""So long the process that keeps the store waits at its end for the others, which may still want to read why."""
_LAUNCHER_FIRST_S = 10.0
"""Our launcher sees a process that hangs, too, and has the stacks of all printed, so it is let go first."""
_LISTEN_EVERY_S = 0.5
_LONGEST_PAUSE_S = 0.05
_SLACK_S = 2.0
"""The store answers in less, unless the line to it is cut."""
_MOST_BYTES = 2**28
_ON_HOST = "gloo"
"""What carries tensors of the host, whatever carries those of the devices."""

T = TypeVar("T")
GaveUp = Callable[[int, int, str], PantheraError]
"""The error for a process (its rank, how many there are, why) that goes no further."""


class _NoAnswer(RuntimeError):
    """Of the store."""


class TorchWorld:
    """A `World`, see distributed/world.py.

    It waits by asking the store again and again, in a thread: what the store itself does while it waits hears no Ctrl-C, and where the
    network is cut it waits for a quarter of an hour.

    Args:
        store: of words. group: the processes, for tensors of the host; None: the default group.
        timeout_s: so long all wait for one of them, at most. lost: where our launcher says who is lost; None: it has not started them.
        keeps_store: it ends with this process. owns_group: nobody else has made the default group, so it is closed at the end.
    """

    called = "process"

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        gave_up: GaveUp,
        *,
        timeout_s: float,
        group: ProcessGroup | None = None,
        keeps_store: bool = False,
        owns_group: bool = False,
        lost: Path | None = None,
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store, self._gave_up, self._group, self._lost = store, gave_up, group, lost
        self._keeps_store, self._owns_group = keeps_store, owns_group
        self._round, self._left, self._over = 0, False, Event()
        self._deeds: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # One thread for all: at the end of the process, when a world is left, Python makes no new one.
        Thread(target=_work, args=(self._deeds,), name="words", daemon=True).start()

    def gathered(self, text: str) -> list[str]:
        """See `World.gathered`. Raises: DeviceError also if one of them does not come within `timeout_s`."""
        here = self._round
        self._round += 1
        with self.connected():
            return self._within(self.timeout_s + _SLACK_S, lambda: self._gathered(here, text))

    def give_up(self, why: str) -> None:
        """See `World.give_up`. The first one is heard."""
        with suppress(RuntimeError):  # the store is gone with its process
            self._within(_SLACK_S, lambda: self._store.compare_set("lost", "", f"{self.rank} {why}"))

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `World.shared`. The tensors are in the host's memory."""
        import torch
        import torch.distributed as dist

        # All are here, so nobody waits within torch, where neither Ctrl-C nor another one's end is heard.
        self.gathered("")
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            values = tensor.detach().contiguous() if self.rank == 0 else torch.zeros(tensor.shape, dtype=tensor.dtype)
            # As bytes: not every group knows every dtype.
            for piece in values.reshape(-1).view(torch.uint8).split(_MOST_BYTES) if values.numel() else ():
                with self.connected():
                    dist.broadcast(piece, src=0, group=self._group)
            found[name] = values
        return found

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within the block, what torch says of a lost connection is an error of a `World`, with the reason if one was given."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_connection(error):
                raise
            with suppress(RuntimeError):  # no answer
                self._within(_SLACK_S, self._listen)
            raise cut_off(error, self.size) from error

    def leave(self) -> None:
        """The end, after which nothing can be said. It is called at the end of the process, if nobody does before."""
        if self._left:
            return
        self._left = True
        with suppress(RuntimeError):
            self._within(_SLACK_S + (LEAVE_S if self._keeps_store else 0.0), self._say_goodbye)
        if self in _joined:
            _joined.remove(self)
        if self._owns_group:
            import torch.distributed as dist

            with suppress(RuntimeError):  # what was still under way in it has failed
                dist.destroy_process_group()

    def _gathered(self, here: int, text: str) -> list[str]:
        self._store.set(f"{here}/{self.rank}", text)
        if self._store.add(f"{here}/came", 1) == self.size:
            self._store.set(f"{here}/all", "")
        self._wait(here)
        found = self._store.multi_get([f"{here}/{rank}" for rank in range(self.size)])
        if here:  # all have come here, so all have read what was said before
            mine = (self.rank, "came", "all") if self.rank == 0 else (self.rank,)
            for each in mine:
                self._store.delete_key(f"{here - 1}/{each}")
        return [each.decode() for each in found]

    def _wait(self, here: int) -> None:
        """Until all have come to a round. Raises: DeviceError if one has given up, or after `timeout_s`."""
        started = listened = time.monotonic()
        pause_s = 0.0002
        while not self._store.check([f"{here}/all"]):
            now = time.monotonic()
            if now > listened + _LISTEN_EVERY_S:
                listened = now
                self._listen()
            if now > started + self.timeout_s:
                raise _not_come([rank for rank in range(self.size) if not self._store.check([f"{here}/{rank}"])], self.size, self.timeout_s)
            if self._over.wait(pause_s):
                raise _NoAnswer("interrupted")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _say_goodbye(self) -> None:
        left, until = self._store.add("left", 1), time.monotonic() + LEAVE_S
        while self._keeps_store and left < self.size and time.monotonic() < until:
            time.sleep(_LONGEST_PAUSE_S)
            left = self._store.add("left", 0)

    def _within(self, limit_s: float, deed: Callable[[], T]) -> T:
        """What a deed with the store gives. Raises: RuntimeError if it has not ended by then."""
        answers: SimpleQueue[Callable[[], T]] = SimpleQueue()

        def run() -> None:
            try:
                found = deed()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the answer is read
                answers.put(partial(_raise, error))
            else:
                answers.put(lambda: found)

        self._deeds.put(run)
        try:
            answer = answers.get(timeout=limit_s)
        except Empty:
            raise _NoAnswer(f"no answer within {limit_s:.0f} s") from None
        except BaseException:  # an interrupt; it is raised again
            self._over.set()
            raise
        return answer()

    def _listen(self) -> None:
        """Raises: DeviceError if a process has given up."""
        said = ""
        with suppress(RuntimeError):  # the store is gone, which the next question to it shows
            said = self._store.get("lost").decode() if self._store.check(["lost"]) else ""
        with suppress(FileNotFoundError):
            said = said or (self._lost.read_text("utf-8") if self._lost else "")
        if said:
            rank, _, why = said.partition(" ")
            error = self._gave_up(int(rank), self.size, why)
            error.exit_code = ANOTHER_GAVE_UP
            raise error


def _is_of_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    # gloo has no kind of error of its own, but names the file that it comes from.
    return isinstance(error, dist.DistError | _NoAnswer) or "gloo" in str(error)


def _work(deeds: SimpleQueue[Callable[[], None]]) -> NoReturn:
    while True:
        deeds.get()()


def _raise(error: Exception) -> NoReturn:
    raise error


_joined: list[TorchWorld] = []
"""The one of this process, once it has joined."""
_stores: list[Store] = []
"""That of this process. It stays open when a world is left: others may still read from it, or join again."""
_joins = count()
"""A store keeps what was said in an earlier world."""


def join_processes(device: Device, announce: Callable[[str], None], gave_up: GaveUp, timeout_s: float) -> TorchWorld:
    """Wait until all processes of the run have come, and make torch's default group of them. Those that have joined stay joined.

    Works under torchrun and under our own launcher; see hardware/processes.py. A default group that is there already is used.

    Args:
        device: on which this process computes; its backend names what carries tensors between such devices.
        announce: hears that it waits. timeout_s: how long, here and later.
    Raises: DeviceError if they do not come, or torch cannot connect such devices; RecipeError if the environment contradicts itself.
    """
    if _joined:
        return _joined[0]
    import torch.distributed as dist

    said = read_processes()
    backend = backend_of(device)
    if backend.collective is None:
        raise DeviceError(
            f"{said.world_size} processes cannot work together on {device} ({device.label})",
            why="torch.distributed does not reach devices of this kind",
            fix="set hardware.devices to 1, or leave it out",
        )
    if not dist.is_available() or not dist.is_backend_available(backend.collective):
        raise DeviceError(
            f"this build of torch has no {backend.collective}",
            why=f"{said.world_size} processes on devices of kind {device.kind} exchange tensors through it",
            fix="install the build of torch for these devices (pytorch.org/get-started), or set hardware.devices to 1",
        )
    patience_s = timeout_s + (_LAUNCHER_FIRST_S if said.logs else 0.0)
    if dist.is_initialized():
        world = _of_group(gave_up, patience_s)
    else:
        announce(f"Waiting for {said.world_size} processes to meet at {said.address}:{said.port}, for {timeout_s:.0f} s at most.")
        world = _of_environment(said, device, gave_up, patience_s)
    _joined.append(world)
    atexit.register(world.leave)
    return world


def leave_processes() -> None:
    """Those that this process has joined go on without it; see `TorchWorld.leave`. Where it has joined none, nothing happens."""
    for world in tuple(_joined):
        world.leave()


def _of_environment(said: Processes, device: Device, gave_up: GaveUp, patience_s: float) -> TorchWorld:
    """The processes that torchrun or our launcher has started."""
    import torch.distributed as dist

    # torchrun's store outlives an attempt, and where the processes of an earlier one listened must not be read again. A store of our
    # own does not, and there the number must not count: a machine that has joined later counts its attempts from 0.
    attempt = said.attempt if said.agent_store else 0
    if not _stores:
        _stores.append(_open_store(said, patience_s))
    store = _part_of(_stores[0], f"pantheraml/{attempt}/{said.world_size}/{next(_joins)}")
    keeps_store = said.rank == 0 and not said.agent_store
    words = _part_of(store, "words")
    lost = lost_file(said.signs) if said.signs else None
    world = TorchWorld(
        words, said.rank, said.world_size, gave_up, timeout_s=patience_s, keeps_store=keeps_store, owns_group=True, lost=lost
    )
    world.gathered("")  # says who has not come; torch would not
    backend = backend_of(device)
    here, collective = backend.torch_device(device.index), backend.collective
    try:
        dist.init_process_group(
            collective if in_host_memory(device.kind) else f"cpu:{_ON_HOST},{here.type}:{collective}",
            store=_part_of(store, "group"),
            rank=said.rank,
            world_size=said.world_size,
            timeout=timedelta(seconds=patience_s),
        )
    except RuntimeError as error:
        world.give_up(str(error))
        raise cut_off(error, said.world_size) from error
    return world


def _of_group(gave_up: GaveUp, patience_s: float) -> TorchWorld:
    """The processes of the default group that a program has made before."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store  # no public name gives it

    store = _part_of(_get_default_store(), f"pantheraml/{next(_joins)}")
    group = None if _ON_HOST in dist.get_backend_config() else dist.new_group(backend=_ON_HOST, timeout=timedelta(seconds=patience_s))
    assert not isinstance(group, int)  # torch's number for a process that is not in the group
    keeps_store = dist.get_rank() == 0  # or torchrun; then it waits at its end for nothing, and not for long
    return TorchWorld(store, dist.get_rank(), dist.get_world_size(), gave_up, timeout_s=patience_s, group=group, keeps_store=keeps_store)


def _part_of(store: Store, name: str) -> Store:
    import torch.distributed as dist

    return dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage] - it is in torch's documentation, and not in __all__


def _open_store(said: Processes, patience_s: float) -> Store:
    """Where the processes leave words for each other: with the first one, or with torchrun."""
    import torch.distributed as dist

    address, port, timeout = said.address or "localhost", said.port or 0, timedelta(seconds=patience_s)
    here = said.rank == 0 and not said.agent_store
    if not here:
        _knock(address, port, patience_s)
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] - as above
            address, port, None, here, timeout, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise DeviceError(
            f"process {said.rank} of {said.world_size} cannot {'listen' if here else 'meet the others'} at {address}:{port}",
            why=str(error).strip().splitlines()[0],
            fix="set MASTER_ADDR to the machine of the first process, and MASTER_PORT to a port that is free there",
        ) from error


def _knock(address: str, port: int, patience_s: float) -> None:
    """Until somebody listens there. torch's own way to wait prints what it does at each turn, and hears no Ctrl-C."""
    until = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((address, port), timeout=min(patience_s, 10.0)).close()
        except OSError as error:  # also a name that the network does not know yet
            if time.monotonic() > until:
                raise DeviceError(
                    f"nobody listened at {address}:{port} within {patience_s:.0f} s",
                    why=f"the first process keeps there what the others must read ({error.strerror or error})",
                    fix="start all processes at about the same time; see that MASTER_ADDR is the machine of the first one, and that no "
                    "firewall stands between",
                ) from error
            time.sleep(0.1)
        else:
            return


def _not_come(ranks: list[int], size: int, waited_s: float) -> DeviceError:
    named = f"process {ranks[0]}" if len(ranks) == 1 else f"the processes {', '.join(map(str, ranks))}"
    return DeviceError(
        f"{named} of {size} did not come within {waited_s:.0f} s",
        why="all processes work on the same steps, and the others waited where they meet",
        fix="see what it printed last, and start all of them again, with --resume where there are checkpoints; if it needs so long for a "
        "checkpoint or an export, raise hardware.timeout_s",
    )


def cut_off(error: RuntimeError, size: int) -> DeviceError:
    """The error for one of torch's that says that a process, or the way to it, is gone."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    broken = DeviceError(
        f"the connection between the {size} processes broke off: {said[0]}",
        why="one of them has ended, or the network between them does not answer",
        fix="see what the others printed last, and start all of them again, with --resume where there are checkpoints",
    )
    broken.exit_code = ANOTHER_GAVE_UP
    return broken
