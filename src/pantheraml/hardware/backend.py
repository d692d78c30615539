"""The border between us and a device. Facts are attributes, deeds are methods; nobody asks "are you CUDA?"."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from pantheraml.hardware.device import Absent, Device
from pantheraml.recipe.types import Kind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes: used by this process now, at its peak since `reset_peak`, and free on the device."""

    used_bytes: int
    peak_bytes: int
    free_bytes: int


class Backend(Protocol):
    """One kind of device. A new one is one file beside this and one row in `BACKENDS`."""

    kind: Kind
    collective: str
    """torch.distributed backend: nccl, xccl, gloo."""
    static_shapes: bool
    """True: every new tensor shape costs a compilation, so batches come in few shapes."""
    attention: tuple[str, ...]
    """attn_implementation names of transformers, best first."""
    quantizers: tuple[str, ...]
    """Ways to hold a frozen base in few bits ("nf4"); empty: none here."""

    def probe(self) -> tuple[Device, ...] | Absent:
        """Run a small computation on each device and describe those that answer."""
        ...

    def torch_device(self, index: int) -> torch.device:
        """Torch's name for it. Where the driver has a current device, this becomes it."""
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

    def synchronize(self) -> None:
        """Wait until the device is idle, before reading a clock."""
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

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this error means that the device's memory ran out."""
        ...


BACKENDS: dict[Kind, str] = {
    "cuda": "pantheraml.hardware.cuda:CudaBackend",
    "xpu": "pantheraml.hardware.xpu:XpuBackend",
    "cpu": "pantheraml.hardware.cpu:CpuBackend",
}
"""In the order in which `auto` prefers them."""


def open_backend(kind: Kind) -> Backend:
    """The backend for `kind`. Imports its file, and nothing of the others."""
    module, name = BACKENDS[kind].split(":")
    backend: Backend = getattr(import_module(module), name)()
    return backend
