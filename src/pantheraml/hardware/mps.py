"""Apple's GPUs through Metal. The only file that spells torch.mps."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch

from pantheraml.hardware.backend import MemoryUse, Telemetry, set_host_threads
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.speed import matmul_flops, matmul_seconds
from pantheraml.recipe.kinds import Kind

_PROBE_SIZE = 2048


class MpsBackend:
    """The GPU of a Mac, which works in the machine's own memory. Written by torch's documentation: only its absence was tried."""

    kind: Kind = "mps"
    engine = "torch"
    collective = None
    static_shapes = False
    attention = ("sdpa", "eager")
    quantizers = ()
    pinned_memory = False

    def probe(self) -> tuple[Device, ...] | Absent:
        """Multiply matrices. A torch without MPS and a Mac without a GPU that Metal offers are told apart."""
        if not torch.backends.mps.is_built():
            return Absent(
                kind="mps",
                why=f"torch {torch.__version__} was built without MPS"
                + ("" if platform.system() == "Darwin" else f", which is Apple's alone; this is {platform.system()}"),
                fix="on a Mac with Apple silicon install torch for macOS, as the installation page of PyTorch says",
            )
        if not torch.backends.mps.is_available():
            return Absent(
                kind="mps",
                why=f"torch was built with MPS, but Metal offers it no GPU (macOS {platform.mac_ver()[0] or 'unknown'} on {platform.machine()})",
                fix="update macOS to 14 or later; a virtual machine, and a Mac with an Intel processor, may have no such GPU",
            )
        return (self._describe(),)

    def _describe(self) -> Device:
        seconds = matmul_seconds(self.torch_device(0), torch.float32, _PROBE_SIZE, self.synchronize)
        use = self.memory(0)
        self.empty_cache()
        return Device(
            kind="mps",
            index=0,
            name=_ask("get_name", platform.processor() or "Apple GPU"),
            memory_bytes=use.total_bytes,
            free_bytes=use.free_bytes,
            # float32 first: the GPUs before the M3 only emulate bfloat16, and no curve of ours was compared on any.
            dtypes=("float32", "bfloat16") if self._multiplies_bfloat16() else ("float32",),
            peak_flops=matmul_flops(seconds, _PROBE_SIZE),
            cores=_ask("get_core_count", None),
        )

    def _multiplies_bfloat16(self) -> bool:
        """Whether a product comes out right. Before macOS 14 torch refuses the dtype with a TypeError."""
        try:
            matmul_seconds(self.torch_device(0), torch.bfloat16, 256, self.synchronize, repeats=1)
        except (TypeError, RuntimeError):
            return False
        return True

    def torch_device(self, index: int) -> torch.device:
        """`mps:0`; there is one, so any other index is a ValueError."""
        if index != 0:
            raise ValueError(f"there is one MPS device, index 0, not {index}")
        return torch.device("mps", 0)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`. float32: does nothing."""
        return nullcontext() if dtype == torch.float32 else torch.autocast("mps", dtype=dtype)

    def seed(self, seed: int) -> None:
        """Set the generators of the CPU and of the GPU."""
        torch.manual_seed(seed)
        torch.mps.manual_seed(seed)

    def set_threads(self, threads: int | None) -> int:
        """Torch's own number is kept unless one is given: the work is on the GPU."""
        return set_host_threads(threads)

    def synchronize(self, index: int | None = None) -> None:
        """Wait for the GPU."""
        torch.mps.synchronize()

    def memory(self, index: int) -> MemoryUse:
        """What torch's tensors hold, and what Metal recommends to take at most of the memory that all programs share.

        Torch keeps no peak here: None.
        """
        total, reserved = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        return MemoryUse(
            total_bytes=total,
            free_bytes=max(0, min(total - reserved, psutil.virtual_memory().available)),
            used_bytes=torch.mps.current_allocated_memory(),
            reserved_bytes=reserved,
            peak_bytes=None,
        )

    def reset_peak(self, index: int) -> None:
        """Nothing: there is no peak."""

    def empty_cache(self) -> None:
        """Give cached blocks back to Metal."""
        torch.mps.empty_cache()

    def recorder(self, index: int) -> None:
        """Nothing is recorded here."""

    def telemetry(self, index: int) -> Telemetry:
        """Nothing: macOS tells it to root only (powermetrics)."""
        return Telemetry()


def _ask(name: str, otherwise: Any) -> Any:
    """What torch.backends.mps says, where it is new enough to have the function."""
    function = getattr(torch.backends.mps, name, None)
    return otherwise if function is None else function()
