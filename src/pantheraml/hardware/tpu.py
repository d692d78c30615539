"""Signs of a TPU that cost nothing to read: the environment and the PCI bus. None of them makes a device; see xla.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Seen
from pantheraml.hardware.settings import read_environment

_PCI_VENDOR = "0x1ae0"  # Google
_PCI_DEVICES = {"0x0027": None, "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x"}
"""Generation by PCI device id, as JAX knows them (jax/_src/hardware_utils.py); v2 and v3 share one."""


class TpuEnvironment(BaseSettings):
    """What the environment says about TPUs. It describes a TPU that answers; it makes none.

    Attributes:
        accelerator_type: "v5litepod-8" (Cloud, Kaggle), "v5e-1" (Colab). topology: of the slice, "2x4" (GKE).
        chips_per_host_bounds: "2,4,1". On Colab it says 2,2,1 for one chip, so what JAX lists is believed before it.
        platforms: those that JAX may use, in order; not set: all.
        slices: that are connected by the network between machines.
        coordinator, processes, process: where the first of several machines listens ("10.0.0.2:8476"), how many there are, and which
            of them this is, from 0. On Google's machines JAX finds that out by itself.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", populate_by_name=True)

    accelerator_type: str | None = Field(default=None, validation_alias="TPU_ACCELERATOR_TYPE")
    name: str | None = Field(default=None, validation_alias="TPU_NAME")
    worker_id: str | None = Field(default=None, validation_alias="TPU_WORKER_ID")
    chips_per_host_bounds: str | None = Field(default=None, validation_alias="TPU_CHIPS_PER_HOST_BOUNDS")
    host_bounds: str | None = Field(default=None, validation_alias="TPU_HOST_BOUNDS")
    topology: str | None = Field(default=None, validation_alias="TPU_TOPOLOGY")
    colab_address: str | None = Field(default=None, validation_alias="COLAB_TPU_ADDR")
    colab_vm: str | None = Field(default=None, validation_alias="COLAB_TPU_1VM")
    libtpu_path: str | None = Field(default=None, validation_alias="TPU_LIBRARY_PATH")
    platforms: str | None = Field(default=None, validation_alias="JAX_PLATFORMS")
    slices: int = Field(default=1, gt=0, validation_alias="MEGASCALE_NUM_SLICES")
    coordinator: str | None = Field(default=None, validation_alias="JAX_COORDINATOR_ADDRESS")
    processes: int = Field(default=1, gt=0, validation_alias="JAX_NUM_PROCESSES")
    process: int = Field(default=0, ge=0, validation_alias="JAX_PROCESS_ID")

    def set_variables(self) -> tuple[str, ...]:
        """Those that point to a TPU, as "NAME=value"."""
        fields = type(self).model_fields
        said = self.model_dump(exclude={"platforms", "slices", "coordinator", "processes", "process"}, exclude_none=True)
        return tuple(f"{fields[name].validation_alias}={value}" for name, value in said.items())

    def slice_shape(self, *, flat: bool) -> str | None:
        """How many chips lie along each axis of the slice, "2x4", or None where the variables do not say."""
        if self.topology:
            return self.topology
        chips, hosts = _numbers(self.chips_per_host_bounds), _numbers(self.host_bounds)
        if len(hosts) == len(chips):
            chips = tuple(chip * host for chip, host in zip(chips, hosts, strict=True))
        return shape_of(chips, flat=flat) if chips else None


def read_tpu_environment() -> TpuEnvironment:
    """What it says now. Raises: RecipeError if a variable has a value that cannot be used."""
    return read_environment(TpuEnvironment)


def shape_of(chips: tuple[int, ...], *, flat: bool) -> str:
    """Chips along each axis, as the vendor writes it: "2x2x1", and "2x4" for generations whose slices are flat."""
    return "x".join(str(each) for each in (chips[:2] if flat and chips[2:] == (1,) else chips))


def seen_on_pci(folder: Path) -> tuple[Seen, ...]:
    """The TPU chips that the kernel lists on the PCI bus, whether or not anything can use them."""
    found: list[str | None] = []
    for device in sorted(folder.glob("*")):
        try:
            vendor, number = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _PCI_VENDOR and number in _PCI_DEVICES:
            found.append(_PCI_DEVICES[number])
    return tuple(Seen(index=index, name=f"TPU {what or 'v2 or v3'}", capability=what) for index, what in enumerate(found))


def device_files(folder: Path) -> bool:
    """Whether the kernel offers files that may belong to a TPU: /dev/accel0, or /dev/vfio/0, which also serves other cards."""
    return any(True for pattern in ("accel[0-9]*", "vfio/[0-9]*") for _ in folder.glob(pattern))


def duty_cycle(data: list[str], index: int, devices: int) -> float | None:
    """Share of the last moments in which the chip of a device was busy, 0 to 1.

    Args:
        data: libtpu's percentages as text, one for each chip ("45.32"); empty before the first computation.
        index, devices: the device meant, and how many there are: on v2, v3 and 7x two share a chip.
    """
    if not data or devices % len(data):
        return None
    try:
        return float(data[index * len(data) // devices]) / 100
    except ValueError:
        return None


def _numbers(bounds: str | None) -> tuple[int, ...]:
    """2,4,1 of a variable; nothing if it is not that."""
    words = bounds.split(",") if bounds else []
    return tuple(int(word) for word in words) if all(word.strip().isdecimal() for word in words) else ()


# ---- Slices by name --------------------------------------------------------------------------------------------------

FLAT = ("v2", "v3", "v5e", "v6e")
"""Generations whose slices have two axes; the others have three."""
_NAMED_BY_CORE = ("v2", "v3", "v4", "v5p", "tpu7x")
"""Generations whose slices are named by TensorCores, two a chip: a v5p-8 has four chips."""
_CORES_APART = ("v2", "v3", "tpu7x")
"""Generations of which JAX shows each core as a device. The two of a v4 or v5p work as one."""
_PROGRAM_GIB = {"v2": 7.48, "v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
"""Generation -> what a program gets of the memory of a device, as the TPU's compiler says where it refuses one (libtpu 0.0.42)."""
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"},
}
"""Axes -> chips -> topology, as Google rents them (cloud.google.com/tpu/docs, 2026-11)."""
_WORD = re.compile(r"(?:(\d+)\*)?(v\d+[a-z]*|tpu7x)[-:](\d+(?:x\d+)*)")


@dataclass(frozen=True, slots=True)
class TpuSlice:
    """Chips of one kind that are connected; or several such slices over a slower network.

    Attributes:
        generation: "v5e". topology: chips along each axis of a slice, "2x4". slices: how many.
    """

    generation: str
    topology: str
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all."""
        return self.slices * math.prod(map(int, self.topology.split("x")))

    @property
    def devices_each(self) -> int:
        """Devices of JAX in a chip."""
        return 2 if self.generation in _CORES_APART else 1

    @property
    def program_bytes(self) -> int | None:
        """What a program gets of the memory of each device; None: not known."""
        found = _PROGRAM_GIB.get(self.generation)
        return None if found is None else int(found * 2**30)

    def __str__(self) -> str:
        return (f"{self.slices}*" if self.slices > 1 else "") + f"{self.generation}-{self.topology}"


def parse_slice(word: str) -> TpuSlice:
    """A slice as Google names it (v5e-8, v5litepod-8; v5p-128 and tpu7x-8 count cores), by topology (v5p-4x4x4), or several (2*v5e-8).

    Raises: DeviceError if there is none of that name.
    """
    found = _WORD.fullmatch(word.strip().lower().replace("v5litepod", "v5e").replace(" ", ""))
    if found is None:
        raise DeviceError(
            f"{word!r} is no name of a TPU slice",
            why="a name is a generation and a number of chips (v5e-8, v6e-16), or a topology (v5p-4x4x4); several slices are 2*v5e-8",
            fix="name it like one of these",
        )
    slices, generation, size = int(found[1] or 1), found[2], found[3]
    if not slices or 0 in map(int, size.split("x")):
        raise DeviceError(f"{word}: a slice has at least one chip", why="it is given as none", fix="name it like v5e-8, or 2*v5e-8")
    axes = 2 if generation in FLAT else 3
    if "x" in size:
        if len(size.split("x")) != axes:
            raise DeviceError(f"{word}: a slice of {generation} has {axes} axes", why=f"it was given as {size}", fix=f"give {axes} numbers")
        return TpuSlice(generation, size, slices)
    chips = int(size) // (2 if generation in _NAMED_BY_CORE else 1)
    if chips not in _SHAPES[axes]:
        known = ", ".join(f"{generation}-{n * (2 if generation in _NAMED_BY_CORE else 1)}" for n in _SHAPES[axes])
        raise DeviceError(f"there is no slice {word}", why="Google rents other sizes", fix=f"choose from {known}")
    return TpuSlice(generation, _SHAPES[axes][chips], slices)


def larger_slices(generation: str) -> tuple[TpuSlice, ...]:
    """The slices of a generation, rising."""
    return tuple(TpuSlice(generation, shape) for shape in _SHAPES[2 if generation in FLAT else 3].values())
