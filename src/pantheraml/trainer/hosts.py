"""A run of several hosts: the first one keeps its folder, and tells the others what is in it. Usually there is one host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

import blake3

from pantheraml.distributed.torch_world import TorchWorld
from pantheraml.distributed.world import Alone, World, open_world, stopping, together, told
from pantheraml.engines.piece import Piece, Stored
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.find import Found, find_own
from pantheraml.hardware.processes import read_processes
from pantheraml.hardware.tpu import read_tpu_environment
from pantheraml.models.quantize import held_tensors
from pantheraml.planning.plan import Plan
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.load import dump_recipe
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.checkpoint import Checkpoint, Checkpoints, Damaged, manifest_of, not_shared, pieces_seen
from pantheraml.trainer.folder import open_folder
from pantheraml.trainer.report import REPORT
from pantheraml.trainer.watch import Team

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run that was begun, or taken up again.

    Attributes:
        folder: of the run; of other hosts than the first a passing one. kept: that of the first one.
        found: the device; or why there is none, for who needs one.
        ended: there is nothing left to do.
    """

    folder: Path
    kept: Path
    recipe: Recipe
    found: Found | DeviceError
    world: World
    console: Console
    ended: bool


@contextmanager
def opened(recipe: Recipe, *, resume: bool, console: Console) -> Iterator[Opened]:
    """The run of a recipe, its folder locked. Raises: see `open_folder`, and DeviceError if not all hosts come."""
    found = _found(recipe)
    alone = isinstance(found, DeviceError)
    timeout_s = recipe.hardware.timeout_s
    world = Alone() if alone else open_world(found.device, lambda said: console.print(said, markup=False, highlight=False), timeout_s)
    with ExitStack() as stack:
        stack.enter_context(stopping(world))
        if isinstance(world, TorchWorld):
            stack.enter_context(world.connected())
        if world.rank == 0:
            folder, recipe = stack.enter_context(open_folder(recipe, resume=resume))
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="pantheraml-host-")))
            called = world.called.capitalize()
            console.print(f"{called} {world.rank} of {world.size}, from 0: the first one keeps the run's folder, and says what happens.")
            console = _silent()
        about = {"name": folder.name, "kept": str(folder), "ended": resume and (folder / REPORT).exists()}
        about = told(world, lambda: about)
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": about["name"]})})
        where = recipe.run.model_copy(update={"folder": "", "name": None})
        check_same(world, dump_recipe(recipe.model_copy(update={"run": where})), "was started with another recipe")
        kept = Path(about["kept"])
        yield Opened(folder=folder, kept=kept, recipe=recipe, found=found, world=world, console=console, ended=about["ended"])


def _found(recipe: Recipe) -> Found | DeviceError:
    try:
        found = find_own(recipe.hardware)
    except DeviceError as error:
        if read_processes().world_size > 1:  # alone, each of them would open the same folder
            raise
        return error
    hosts = read_tpu_environment().processes
    if found.device.hosts < hosts:
        return DeviceError(
            f"{hosts} hosts are to work together, and {found.device} is of this one alone",
            why=f"JAX_NUM_PROCESSES={hosts} says so, and {found.why}",
            fix="unset it, or set hardware.kind to tpu",
        )
    return found


def _silent() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def agreed(plan: Plan, world: World) -> Plan:
    """That of the first process, on this one's device: what is free on the others may have given them another one."""
    if world.size == 1:
        return plan
    first = Plan.from_dict(told(world, plan.to_dict))
    return replace(first, device=replace(first.device, index=plan.device.index))


def check_started(plan: Plan, world: World) -> None:
    """Raises: DeviceError if the plan is for more processes than somebody has started."""
    if KINDS[plan.device.kind].engine == "torch" and plan.world_size != world.size:
        raise DeviceError(
            f"{plan.world_size} devices are to train together, and {world.size} process{'' if world.size == 1 else 'es'} of the run "
            f"{'is' if world.size == 1 else 'are'} here",
            why="each device has a process of its own, which runs the whole script",
            fix=f"start it with torchrun --nproc-per-node {plan.world_size} SCRIPT.py, or a recipe with pantheraml train; "
            "or set hardware.devices to 1, and leave parallel, dp, fsdp, cp and tp out",
        )


def check_same(world: World, what: str, said: str) -> None:
    """Raises: PantheraError, in all processes, if one of them has something else. said: what is wrong with that one."""
    found = world.gathered(blake3.blake3(what.encode()).hexdigest())
    other = [rank for rank, each in enumerate(found) if each != found[0]]
    if other:
        raise PantheraError(
            f"{world.called} {other[0]} of {world.size} {said} than {world.called} 0",
            why=f"each {world.called} takes its share of the same steps, so all of them must have the same recipe, rows and weights",
            fix="copy the same files to all machines, and start the same command on all of them",
        )


def identity(model: Any) -> str:
    """A checksum of the names, the shapes and every bit of a model's weights; a thread of an EPYC reads 2 to 6 GB/s in ordinary memory."""
    import torch

    found = blake3.blake3(max_threads=torch.get_num_threads())
    for name, tensor in held_tensors(model):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hand_over(world: World, folder: Path) -> None:
    """The files of a small folder of the first process, in the folder of the same name of each other one.

    Hosts of a TPU make it each for themselves: JAX must not start before the run has said how many devices there are.
    """
    if not isinstance(world, TorchWorld):
        return
    import torch

    sizes = told(world, lambda: {place.name: place.stat().st_size for place in sorted(folder.iterdir()) if place.is_file()})
    for name, size in sizes.items():
        content = (
            torch.zeros(size, dtype=torch.uint8)
            if world.rank
            else torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=torch.uint8)
        )
        given = world.shared({name: content})[name]
        if world.rank:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(given.numpy().tobytes())


def keeping_up(world: World, waited_s: Callable[[], float]) -> Callable[[float], Team]:
    """How the processes of a run kept up with each other in the last so many seconds, which all of them ask at the same step.

    Args:
        waited_s: how long this one has waited for the others since it was asked last.
    """

    def look(seconds: float) -> Team:
        own_work = [float(each) for each in world.gathered(repr(min(1.0, max(0.0, 1 - waited_s() / seconds))))]
        mean = sum(own_work) / len(own_work)
        slowest = max(range(len(own_work)), key=lambda rank: own_work[rank])
        return Team(processes=world.size, waiting=1 - mean, slowest=slowest, behind=own_work[slowest] / mean - 1 if mean else 0.0)

    return look


class KeptByFirst:
    """The checkpoints of a run of several processes, with the methods of `Checkpoints`, which all of them call.

    Whole tensors the first process writes, reads and passes on, so the others need no disk in common with it. Pieces each
    process writes and reads in the folder of the first, which then all must see.

    Args:
        own: those of this process. Only the first one's are used, and the others' must not be of the same folder.
        run: the folder of the run, on the host of the first process.
    """

    def __init__(self, own: Checkpoints, world: World, run: Path) -> None:
        self._own, self._world, self.run = own, world, run

    def steps(self) -> list[int]:
        """See `Checkpoints.steps`."""
        steps: list[int] = told(self._world, self._own.steps)
        return steps

    def save(self, step: int, tensors: Mapping[str, Tensor | Piece], state: Mapping[str, Any], *, best: int | None) -> Path:
        """See `Checkpoints.save`."""
        return self._own.save(step, tensors, state, best=best, world=self._world)

    def newest(self, announce: Callable[[str], None]) -> Checkpoint | None:
        """See `Checkpoints.newest`."""
        return self._read(partial(self._own.newest, announce))

    def load(self, step: int) -> Checkpoint:
        """See `Checkpoints.load`."""
        found = self._read(partial(self._own.load, step))
        assert found is not None
        return found

    def discard_after(self, step: int) -> None:
        """See `Checkpoints.discard_after`."""
        told(self._world, lambda: self._own.discard_after(step))

    def check_shared(self) -> None:
        """Ask this before a divided model trains, rather than when its first checkpoint is due.

        Raises: StorageError if this process does not see the folder of the run; DeviceError if another one does not.
        """
        made = Path(told(self._world, lambda: str(Path(mkdtemp(prefix=".seen-", dir=self.run)).absolute())))
        try:
            with together(self._world):
                if not made.is_dir():
                    raise not_shared(made, self._world)
        finally:
            if self._world.rank == 0:
                made.rmdir()

    def _read(self, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What the first process reads, on all of them. Raises: Damaged, on all; StorageError if one does not see the pieces."""
        import torch

        whole: dict[str, Tensor] = {}

        def about() -> dict[str, Any] | None:
            nonlocal whole
            try:
                found = read()
            except Damaged as error:
                return {"damaged": str(error)}
            if found is None:
                return None
            whole = {name: value for name, value in found.tensors.items() if not isinstance(value, Stored)}
            like = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in whole.items()}
            place = self._own.place(found.step)
            pieces = [str(place.absolute()), manifest_of(place)] if len(whole) < len(found.tensors) else None
            return {"step": found.step, "state": found.state, "like": like, "pieces": pieces}

        said = told(self._world, about)
        if said is None:
            return None
        if "damaged" in said:
            raise Damaged(said["damaged"])
        divided: dict[str, Stored] = {}
        if said["pieces"]:
            place, manifest = said["pieces"]
            with together(self._world):
                divided = pieces_seen(Path(place), manifest, self._world)
        if self._world.rank:
            whole = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in said["like"].items()}
        return Checkpoint(said["step"], {**self._world.shared(whole), **divided}, said["state"])
