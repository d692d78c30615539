"""The border between us and a device. Facts are attributes, deeds are methods; nobody asks "are you CUDA?"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from pantheraml.hardware.device import Absent, Device
from pantheraml.recipe.kinds import KINDS, Kind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on one device; the same keys for every kind, None where the driver does not tell.

    Attributes:
        total_bytes: all that this process could ever have. free_bytes: what is left of it now, for anybody.
        used_bytes: held by this process's tensors; on a CPU, by the process.
        reserved_bytes: taken from the driver by this process's allocator, `used_bytes` included.
        peak_bytes: the most that `used_bytes` was since `reset_peak`.
    """

    total_bytes: int | None
    free_bytes: int | None
    used_bytes: int | None
    reserved_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a driver tells of a device at this moment; None where it does not.

    Attributes:
        utilization: share of the last moments in which the device was busy, 0 to 1.
        temperature_c: of the chip, in degrees Celsius. power_w: drawn now, in watts.
    """

    utilization: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


Recorder = Callable[[Callable[[], "torch.Tensor"]], tuple["torch.Tensor", Callable[[], None]]]
"""Takes a computation and gives where its result will stand, and what computes it: at each call once, from what then stands in the
memory that it reads. The computation itself may not have run."""


class Backend(Protocol):
    """One kind of device. A new one is one file beside this and one row in recipe/kinds.py."""

    kind: Kind
    engine: str
    """Which engine computes training steps on it: "torch" or "xla"."""
    collective: str | None
    """torch.distributed backend: nccl, xccl, gloo. None: torch.distributed does not reach it."""
    static_shapes: bool
    """True: every new tensor shape costs a compilation, so batches come in few shapes."""
    attention: tuple[str, ...]
    """attn_implementation names of transformers, best first."""
    quantizers: tuple[str, ...]
    """Ways to hold a frozen base in few bits ("nf4"); empty: none here."""
    pinned_memory: bool
    """True: the host waits for a copy to the device unless the memory that is copied cannot be paged out."""

    def probe(self) -> tuple[Device | Absent, ...] | Absent:
        """Run a small computation on each device: what answers is described, what does not says why."""
        ...

    def torch_device(self, index: int) -> torch.device:
        """Torch's name for it. Where the driver has a current device, this becomes it. Raises: DeviceError if torch has none."""
        ...

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`, reductions in float32. float32: does nothing."""
        ...

    def seed(self, seed: int) -> None:
        """Set every generator that a model on this device draws from."""
        ...

    def set_threads(self, threads: int | None) -> int:
        """CPU threads for torch; None: all cores this process may use. Returns the number set."""
        ...

    def synchronize(self, index: int | None = None) -> None:
        """Wait until a device is idle, before reading a clock. None: the current one."""
        ...

    def memory(self, index: int) -> MemoryUse:
        """What this process uses now and used at most, and what is left."""
        ...

    def reset_peak(self, index: int) -> None:
        """Start the peak anew."""
        ...

    def empty_cache(self) -> None:
        """Give back what the allocator keeps for later, where it keeps any."""
        ...

    def recorder(self, index: int) -> Recorder | None:
        """What records the kernels of a computation, to start them all at once later; None: nothing here does."""
        ...

    def telemetry(self, index: int) -> Telemetry:
        """What the driver tells now. Cheap enough for every second; starts no computation."""
        ...


def open_backend(kind: Kind, *, simulate: bool = False) -> Backend:
    """The backend for `kind`. Imports its file, and nothing of the others. simulate: XLA on the CPU, for a kind of its engine."""
    module, name = KINDS[kind].backend.split(":")
    make = getattr(import_module(module), name)
    backend: Backend = make(simulate=True) if simulate else make()
    return backend


def backend_of(device: Device) -> Backend:
    """The backend that drives a device that was found."""
    return open_backend(device.kind, simulate=device.simulated and KINDS[device.kind].engine == "xla")


def set_host_threads(threads: int | None) -> int:
    """CPU threads of torch beside a device that does the work itself; None: torch's own number is kept. Returns the number."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
