"""JAX's devices as a mesh: those that are here, those of the CPU that stand in for them, and those of a slice that is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy

from pantheraml.errors import DeviceError
from pantheraml.hardware.tpu import TpuEnvironment, TpuSlice
from pantheraml.hardware.xla import INSTALL, installed


def open_mesh(axes: Mapping[str, int], *, simulate: bool, cache: Path) -> Any:
    """A `jax.sharding.Mesh` with these axes over as many of JAX's devices; starts JAX in this process.

    Args:
        simulate: take the CPU's devices. Where JAX has not started yet, the CPU shows as many as that.
        cache: what is compiled from then on is kept in a folder of it.
    Raises: DeviceError if there are fewer.
    """
    jax: Any = import_module("jax")  # whether it has started is not in its public face

    wanted = math.prod(axes.values())
    jax.config.update("jax_compilation_cache_dir", str(cache.expanduser() / "xla"))
    if not jax._src.xla_bridge.backends_are_initialized():
        if simulate:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", wanted)
        elif TpuEnvironment().platforms is None:
            jax.config.update("jax_platforms", "tpu,cpu")
    devices = jax.devices("cpu" if simulate else "tpu")
    if len(devices) < wanted:
        before = "; or begin with so many: JAX was started in this process with fewer CPU devices" if simulate else ""
        raise DeviceError(
            f"{wanted} devices were asked for ({' x '.join(f'{axis} {size}' for axis, size in axes.items())})",
            why=f"JAX has {len(devices)} here: {devices[0].device_kind}",
            fix=f"ask for at most {len(devices)}{before}",
        )
    shape = tuple(axes.values())
    if wanted == len(devices) and not simulate:  # JAX knows which of them are neighbours
        return jax.make_mesh(shape, tuple(axes), devices=devices)
    return jax.sharding.Mesh(numpy.array(devices[:wanted]).reshape(shape), tuple(axes))


def mesh_of_slice(tpu: TpuSlice, axes: Mapping[str, int]) -> Any:
    """A mesh of devices that are not here, for which programs can be compiled, by libtpu; JAX itself runs on the CPU.

    Raises: DeviceError if libtpu is not installed, does not know such a slice, or the axes have another number of devices.
    """
    import jax

    if not installed("libtpu"):
        raise DeviceError("libtpu is not installed", why="it is the compiler of TPUs, with or without one", fix=INSTALL)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": tpu.slices} if tpu.slices > 1 else {}
    if tpu.chips == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{tpu.generation}:{tpu.topology}", **more)
    except RuntimeError as error:
        raise DeviceError(f"libtpu knows no slice {tpu}", why=str(error).strip().splitlines()[0], fix="name another one") from error
    devices = sorted(found.devices, key=lambda device: getattr(device, "slice_index", 0))
    if len(devices) != math.prod(axes.values()):
        raise DeviceError(
            f"{tpu} has {len(devices)} devices, and {math.prod(axes.values())} are planned",
            why="each core of a chip is one on v2, v3 and 7x",
            fix="say how many with hardware.devices",
        )
    return jax.sharding.Mesh(numpy.array(devices).reshape(tuple(axes.values())), tuple(axes))
