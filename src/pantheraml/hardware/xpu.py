"""Intel GPUs. The only file that spells torch.xpu."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from pantheraml.hardware.backend import MemoryUse, Telemetry, set_host_threads
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.sensors import PowerMeter, intel_energy_uj, intel_gpus, intel_temperature_c
from pantheraml.hardware.speed import matmul_flops, matmul_seconds
from pantheraml.recipe.kinds import Kind

_PROBE_SIZE = 4096


class XpuBackend:
    """GPUs that torch reaches through Intel's Level Zero."""

    kind: Kind = "xpu"
    engine = "torch"
    collective = "xccl"
    static_shapes = False
    attention = ("sdpa", "eager")
    quantizers = ("nf4",)
    pinned_memory = True

    def __init__(self) -> None:
        self._power: dict[int, PowerMeter] = {}

    def probe(self) -> tuple[Device | Absent, ...] | Absent:
        """Multiply matrices on each GPU. A torch without XPU and a missing driver are told apart."""
        if torch.version.xpu is None:
            return Absent(
                kind="xpu",
                why=f"torch {torch.__version__} was built without XPU",
                fix="with an Intel GPU install its driver, then the XPU build of torch, as the installation page of PyTorch says",
            )
        if not torch.xpu.is_available():
            return Absent(
                kind="xpu", why="torch was built for XPU, but the driver lists no Intel GPU", fix="install Intel's GPU driver (Level Zero)"
            )
        return tuple(self._describe_or_why(index) for index in range(torch.xpu.device_count()))

    def _describe_or_why(self, index: int) -> Device | Absent:
        """One GPU that fails (full, lost) must not hide the others."""
        try:
            return self._describe(index)
        except RuntimeError as error:
            return Absent(
                kind="xpu",
                why=f"xpu:{index} ({torch.xpu.get_device_name(index)}) did not answer: {str(error).strip().splitlines()[0]}",
                fix="free its memory if another program holds it, or reset it",
            )

    def _describe(self, index: int) -> Device:
        properties = torch.xpu.get_device_properties(index)
        with torch.xpu.device(index):
            native = torch.xpu.is_bf16_supported(including_emulation=False)
            dtypes = ("bfloat16", "float32") if native else ("float32",)
            dtype = torch.bfloat16 if native else torch.float32
            seconds = matmul_seconds(torch.device("xpu", index), dtype, _PROBE_SIZE, self.synchronize)
            torch.xpu.empty_cache()
            free, total = torch.xpu.mem_get_info(index)
        return Device(
            kind="xpu",
            index=index,
            name=properties.name,
            memory_bytes=total,
            free_bytes=free,
            dtypes=dtypes,
            peak_flops=matmul_flops(seconds, _PROBE_SIZE),
            # Level Zero has no number like CUDA's: the architecture is only an id, which says nothing to a reader.
            cores=properties.gpu_subslice_count or None,  # Intel's Xe cores
        )

    def torch_device(self, index: int) -> torch.device:
        """`xpu:index`, which also becomes the current one that synchronize and empty_cache act on."""
        torch.xpu.set_device(index)
        return torch.device("xpu", index)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`. float32: does nothing."""
        return nullcontext() if dtype == torch.float32 else torch.autocast("xpu", dtype=dtype)

    def seed(self, seed: int) -> None:
        """Set the generators of the CPU and of every GPU."""
        torch.manual_seed(seed)
        torch.xpu.manual_seed_all(seed)

    def set_threads(self, threads: int | None) -> int:
        """Torch's own number is kept unless one is given: the work is on the GPU."""
        return set_host_threads(threads)

    def synchronize(self, index: int | None = None) -> None:
        """Wait for a GPU; None: the current one."""
        torch.xpu.synchronize(index)

    def memory(self, index: int) -> MemoryUse:
        """What torch's tensors hold, held at most, and what the driver has left."""
        free, total = torch.xpu.mem_get_info(index)
        return MemoryUse(
            total_bytes=total,
            free_bytes=free,
            used_bytes=torch.xpu.memory_allocated(index),
            reserved_bytes=torch.xpu.memory_reserved(index),
            peak_bytes=torch.xpu.max_memory_allocated(index),
        )

    def reset_peak(self, index: int) -> None:
        """Start the peak anew."""
        torch.xpu.reset_peak_memory_stats(index)

    def empty_cache(self) -> None:
        """Give cached blocks back to the driver."""
        torch.xpu.empty_cache()

    def recorder(self, index: int) -> None:
        """Nothing is recorded here."""

    def telemetry(self, index: int) -> Telemetry:
        """Temperature and power from the kernel's files, where they are surely this GPU's; power from the second call on.

        Torch tells the PCI device id but not the address, so of two equal cards, and of the tiles of one that are
        counted as devices, nothing is known. The kernel counts only the time in which a GPU slept: utilization is unknown.
        """
        properties = [torch.xpu.get_device_properties(each) for each in range(torch.xpu.device_count())]
        ids = [getattr(each, "device_id", None) for each in properties]  # older torch does not tell it
        mine = ids[index]
        folders = () if mine is None else intel_gpus(mine)
        if len(folders) != 1 or ids.count(mine) != 1:
            return Telemetry()
        meter = self._power.setdefault(index, PowerMeter())
        return Telemetry(temperature_c=intel_temperature_c(folders[0]), power_w=meter.watts(intel_energy_uj(folders[0]), time.monotonic()))
