"""JAX's devices as a mesh: those that are here, those of the CPU that stand in for them, and those of a slice that is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy

from pantheraml.errors import DeviceError
from pantheraml.hardware.tpu import TpuSlice, read_tpu_environment
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
            jax.config.update("jax_num_cpu_devices", -(-wanted // read_tpu_environment().processes))
        elif read_tpu_environment().platforms is None:
            jax.config.update("jax_platforms", "tpu,cpu")
    try:
        devices = jax.devices("cpu" if simulate else "tpu")
    except RuntimeError as error:
        raise DeviceError("JAX has no such devices", why=str(error).strip().splitlines()[0], fix=INSTALL) from error
    if len(devices) < wanted:
        before = "; or begin with so many: JAX was started in this process with fewer CPU devices" if simulate else ""
        raise DeviceError(
            f"{wanted} devices were asked for ({' x '.join(f'{axis} {size}' for axis, size in axes.items())})",
            why=f"JAX has {len(devices)} here: {devices[0].device_kind}",
            fix=f"ask for at most {len(devices)}{before}",
        )
    if wanted < len(devices):  # any of them, and as many of each host
        hosts = sorted({device.process_index for device in devices})
        each = [[device for device in devices if device.process_index == host][: wanted // len(hosts)] for host in hosts]
        return jax.sharding.Mesh(numpy.array(each).reshape(tuple(axes.values())), tuple(axes))
    return _mesh(devices, axes)


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
    if tpu.chips == tpu.slices:
        more["chips_per_host_bounds"] = (1, 1, 1)
    if tpu.generation == "v4":  # its two cores work as one, as they do in a run; of the others libtpu knows that by itself
        more["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{tpu.generation}:{tpu.topology}", **more)
    except RuntimeError as error:
        if "lockfile" in str(error):
            fix = "wait for it; or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 where no TPU is attached"
            raise DeviceError("another process works with libtpu", why="it lets in one at a time", fix=fix) from error
        raise DeviceError(f"libtpu knows no slice {tpu}", why=str(error).strip().splitlines()[0], fix="name another one") from error
    devices = list(found.devices)
    if len(devices) != math.prod(axes.values()):
        raise DeviceError(
            f"{tpu} has {len(devices)} devices, and {math.prod(axes.values())} are planned",
            why="a slice that is not here is planned as a whole",
            fix="leave hardware.devices out, or name a smaller slice",
        )
    return _mesh(devices, axes)


def _mesh(devices: Sequence[Any], axes: Mapping[str, int]) -> Any:
    """Devices that are near each other lie next to each other; those of a slice have one place along dcn."""
    import jax
    from jax.experimental import mesh_utils

    shape, slices = tuple(axes.values()), {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 and axes.get("dcn") != len(slices):  # an axis runs over several slices: one after the other
        arranged = numpy.array(sorted(devices, key=lambda device: device.slice_index)).reshape(shape)
    elif len(slices) > 1:
        inside, across = (1, *shape[1:]), (len(slices), *(1 for _ in shape[1:]))
        arranged = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(arranged, tuple(axes))
