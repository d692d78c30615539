"""TPUs through torch itself: Google's torch_tpu gives torch a device `tpu`, and torch.accelerator speaks for it.

`import torch` loads the package, which registers the device where it finds a chip; nothing of it is imported here. The facts
below are those of torch_tpu 0.2.0 with torch 2.13, read and tried where no TPU was.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pantheraml.hardware.backend import MemoryUse, Telemetry, set_host_threads
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.speed import matmul_flops, matmul_seconds
from pantheraml.hardware.tpu import seen_on_pci
from pantheraml.recipe.kinds import Kind, torch_type

_PROBE_SIZE = 4096


class TorchTpuBackend:
    """The TPU that torch_tpu binds this process to. Unproven: nothing of this has run on a TPU, only its absence was tried.

    Where torch_tpu finds a chip it replaces torch.compile, and it rounds float32 to bfloat16 in products unless torch.set_float32_matmul_precision asks
    for more. XLA through JAX (xla.py) is preferred: see `yields_to` in recipe/kinds.py.

    Args:
        root: where the kernel's files are (/sys).
    """

    kind: Kind = "torch_tpu"
    engine = "torch"
    collective = None  # it brings a process group of its own, tpu_dist, which nothing here was tried with
    static_shapes = True
    attention = ("sdpa", "eager")
    quantizers = ()
    pinned_memory = False

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._pci = root / "sys/bus/pci/devices"

    def probe(self) -> tuple[Device, ...] | Absent:
        """Multiply matrices on this process's chip, which takes it. A missing package, and one that found no TPU, are told apart."""
        chips = seen_on_pci(self._pci)
        if find_spec("torch_tpu") is None:
            return Absent(
                kind="torch_tpu",
                why="torch_tpu, by which torch itself would reach a TPU, is not installed",
                fix="nothing is missing if kind tpu answers; else pip install torch_tpu (beta, unproven here)",
            )
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or accelerator.type != torch_type("torch_tpu"):
            return Absent(
                kind="torch_tpu",
                why=f"torch_tpu is installed, but registered no TPU when torch was imported: torch's accelerator is {accelerator or 'none'}",
                fix="run this on a machine with a TPU that shows under /dev/vfio, and leave TORCH_DEVICE_BACKEND_AUTOLOAD unset",
                seen=chips,
            )
        try:
            return (self._describe(torch.accelerator.current_device_index()),)
        except RuntimeError as error:
            return Absent(
                kind="torch_tpu",
                why=f"it did not answer: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
                fix="stop any other process that uses the TPU: it serves one at a time",
                seen=chips,
            )

    def _describe(self, index: int) -> Device:
        where = self.torch_device(index)
        # Starts the runtime. Where that fails, this is an error that can be caught; the first tensor would abort the process.
        torch.Generator(device=where)
        seconds = matmul_seconds(where, torch.bfloat16, _PROBE_SIZE, self.synchronize)
        self.empty_cache()
        use = self.memory(index)
        chip = next(iter(seen_on_pci(self._pci)), None)  # those of a host are alike
        return Device(
            kind="torch_tpu",
            index=index,
            name=chip.name if chip else "TPU",
            memory_bytes=use.total_bytes,
            free_bytes=use.free_bytes,
            dtypes=("bfloat16", "float32"),
            peak_flops=matmul_flops(seconds, _PROBE_SIZE),
            capability=chip.capability if chip else None,
        )

    def torch_device(self, index: int) -> torch.device:
        """`tpu:index`. Raises: ValueError for another chip than this process's, since torch_tpu does not change over to it."""
        mine = torch.accelerator.current_device_index()
        if index != mine:
            raise ValueError(f"torch_tpu binds this process to the TPU of index {mine}, not {index}")
        return torch.device(torch_type("torch_tpu"), index)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`. float32: does nothing."""
        return nullcontext() if dtype == torch.float32 else torch.autocast(torch_type("torch_tpu"), dtype=dtype)

    def seed(self, seed: int) -> None:
        """Set the generators of the CPU and of the TPU: torch's own function knows both."""
        torch.manual_seed(seed)

    def set_threads(self, threads: int | None) -> int:
        """Torch's own number is kept unless one is given: the work is on the TPU."""
        return set_host_threads(threads)

    def synchronize(self, index: int | None = None) -> None:
        """Wait for the TPU."""
        torch.accelerator.synchronize(index)

    def memory(self, index: int) -> MemoryUse:
        """What torch's allocator tells; it starts the runtime, and says 0 of 0 where that tells nothing."""
        free, total, stats = 0, 0, dict[str, Any]()
        with suppress(RuntimeError):  # no allocator of a device that is not torch's own has to tell
            free, total = torch.accelerator.get_memory_info(index)
            stats = dict(torch.accelerator.memory_stats(index)) if total else {}
        return MemoryUse(
            total_bytes=total or None,
            free_bytes=free if total else None,
            used_bytes=stats.get("allocated_bytes.all.current"),
            reserved_bytes=None,  # whether its figure includes what is used is not documented
            peak_bytes=stats.get("allocated_bytes.all.peak"),
        )

    def reset_peak(self, index: int) -> None:
        """Start the peak anew, where the allocator can."""
        with suppress(RuntimeError):
            torch.accelerator.reset_peak_memory_stats(index)

    def empty_cache(self) -> None:
        """Give back what the allocator keeps, if anything."""
        torch.accelerator.empty_cache()

    def recorder(self, index: int) -> None:
        """Nothing is recorded here."""

    def telemetry(self, index: int) -> Telemetry:
        """Nothing: torch asks for none of it."""
        return Telemetry()
