"""Which engine computes the steps on a device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from pantheraml.distributed.torch_world import TorchWorld
from pantheraml.distributed.world import World
from pantheraml.engines.engine import Engine
from pantheraml.engines.graphs import Graphs
from pantheraml.engines.parallel import Parallel
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import MissingExtra
from pantheraml.hardware.backend import Backend
from pantheraml.hardware.recovery import Recovery
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.xla_mesh import open_mesh
from pantheraml.planning.memory import Level
from pantheraml.planning.plan import Plan


def open_engine(
    backend: Backend,
    plan: Plan,
    recovery: Recovery | None = None,
    graphs: Graphs | None = None,
    allowed: Sequence[Level] = (),
    parallel: Parallel | None = None,
) -> Engine:
    """The engine of the backend.

    Args:
        allowed: levels to which XLA's may go down by itself; torch's asks the relief that it is given.
        parallel: see `open_parallel`.
    Raises: DeviceError if the plan wants more devices than there are, MissingExtra."""
    if backend.engine == "torch":
        return TorchEngine(backend, recovery, graphs, parallel)
    if find_spec("torchax") is None:
        raise MissingExtra("torchax", needed_for=f"training on {plan.device}", install="pantheraml[xla]")
    from pantheraml.engines.xla_engine import XlaEngine

    return XlaEngine(open_mesh(plan.mesh, simulate=plan.device.simulated, cache=read_settings().cache), recovery, allowed)


def open_parallel(backend: Backend, plan: Plan, world: World) -> Parallel | None:
    """This process's place among those that train by torch; None: it does so alone."""
    if world.size == 1 or backend.engine != "torch":
        return None
    assert isinstance(world, TorchWorld)
    # Everywhere as long as the world waits: our launcher must see first that one hangs, while the others still stand where they wait.
    return Parallel(plan.mesh, backend.torch_device(plan.device.index), world.timeout_s)


def loading_device(backend: Backend, index: int, *, divided: bool = False) -> torch.device:
    """Where a model is loaded, for an engine to take it over: on its device, or on the host where torch cannot reach that.

    Args:
        divided: the engine takes a part of it, and the whole may have no room on the device.
    """
    return backend.torch_device(index) if backend.engine == "torch" and not divided else torch.empty(0).device
