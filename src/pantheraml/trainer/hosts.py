"""A run of several hosts: the first one keeps its folder, and tells the others what is in it. Usually there is one host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import blake3

from pantheraml.distributed.world import Alone, World, open_world, stopping, told
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.find import Found, find
from pantheraml.hardware.tpu import read_tpu_environment
from pantheraml.planning.plan import Plan
from pantheraml.recipe.load import dump_recipe
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.checkpoint import Checkpoint, Checkpoints, Damaged
from pantheraml.trainer.folder import open_folder
from pantheraml.trainer.report import REPORT

if TYPE_CHECKING:
    from rich.console import Console


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
    world = Alone() if alone else open_world(found.device, lambda said: console.print(said, markup=False, highlight=False))
    with ExitStack() as stack:
        stack.enter_context(stopping(world))
        if world.rank == 0:
            folder, recipe = stack.enter_context(open_folder(recipe, resume=resume))
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="pantheraml-host-")))
            console.print(f"Host {world.rank} of {world.size}, from 0: the first one keeps the run's folder, and says what happens.")
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
        found = find(recipe.hardware)
    except DeviceError as error:
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
    """That of the first host: what is free on the others may have given them another one."""
    return plan if world.size == 1 else Plan.from_dict(told(world, plan.to_dict))


def check_same(world: World, what: str, said: str) -> None:
    """Raises: PantheraError, on all hosts, if one of them has something else. said: what is wrong with that host."""
    found = world.gathered(blake3.blake3(what.encode()).hexdigest())
    other = [rank for rank, each in enumerate(found) if each != found[0]]
    if other:
        raise PantheraError(
            f"host {other[0]} of {world.size} {said} than host 0",
            why="each host takes its share of the same steps, so all of them must have the same recipe, rows and weights",
            fix="copy the same files to all hosts, and start the same command on all of them",
        )


def identity(model: Any) -> str:
    """The names, shapes and first values of all weights."""
    return repr([(name, tuple(each.shape), each.detach().flatten()[:8].tolist()) for name, each in model.named_parameters()])


class KeptByFirst:
    """The checkpoints of a run of several hosts, with the methods of `Checkpoints`, which all hosts call.

    Args:
        own: those of this host; only the first one's are used. run: the folder of the run, on the first host.
    """

    def __init__(self, own: Checkpoints, world: World, run: Path) -> None:
        self._own, self._world, self.run = own, world, run

    def steps(self) -> list[int]:
        """See `Checkpoints.steps`."""
        steps: list[int] = told(self._world, self._own.steps)
        return steps

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best: int | None) -> Path:
        """See `Checkpoints.save`."""
        return Path(told(self._world, lambda: str(self._own.save(step, tensors, state, best=best))))

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

    def _read(self, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What the first host reads, on all of them. Raises: Damaged, on all of them."""
        import torch

        found: Checkpoint | None = None

        def about() -> dict[str, Any] | None:
            nonlocal found
            try:
                found = read()
            except Damaged as error:
                return {"damaged": str(error)}
            if found is None:
                return None
            like = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in found.tensors.items()}
            return {"step": found.step, "state": found.state, "like": like}

        said = told(self._world, about)
        if said is None:
            return None
        if "damaged" in said:
            raise Damaged(said["damaged"])
        if found is not None:
            tensors = found.tensors
        else:
            tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in said["like"].items()}
        return Checkpoint(said["step"], self._world.shared(tensors), said["state"])
