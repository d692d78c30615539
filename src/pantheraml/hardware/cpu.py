"""The CPU: always there, and the reference that every other device is compared with."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from pantheraml.hardware.backend import MemoryUse, Telemetry
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.sensors import PowerMeter, package_energy
from pantheraml.hardware.speed import matmul_flops, matmul_seconds
from pantheraml.recipe.kinds import Kind

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_PROBE_SIZE = 768  # a few milliseconds a product


class CpuBackend:
    """One device, `cpu:0`, whatever the number of sockets."""

    kind: Kind = "cpu"
    engine = "torch"
    collective = "gloo"
    static_shapes = False
    attention = ("sdpa", "eager")
    pinned_memory = False

    def __init__(self) -> None:
        self.quantizers = ("nf4", "int8") if multiplies_int8() else ("nf4",)
        self._times: Any = None
        self._power = PowerMeter()

    def probe(self) -> tuple[Device, ...] | Absent:
        """bfloat16 is named first where the processor multiplies it; the speed is that of a product (0.1 s).

        The clock does not decide: on a busy machine it errs now and then, and the same recipe would give other weights.
        """
        low_first = multiplies_bfloat16()
        seconds = matmul_seconds(torch.device("cpu"), torch.bfloat16 if low_first else torch.float32, _PROBE_SIZE, self.synchronize)
        total, free = usable_memory()
        device = Device(
            kind="cpu",
            index=0,
            name=cpu_name(),
            memory_bytes=total,
            free_bytes=free,
            dtypes=("bfloat16", "float32") if low_first else ("float32", "bfloat16"),
            peak_flops=matmul_flops(seconds, _PROBE_SIZE),
            cores=usable_cores(),
        )
        return (device,)

    def torch_device(self, index: int) -> torch.device:
        """`cpu`; there is one, so any other index is a ValueError."""
        if index != 0:
            raise ValueError(f"there is one CPU device, index 0, not {index}")
        return torch.device("cpu")

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`. float32: does nothing."""
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)

    def seed(self, seed: int) -> None:
        """Set torch's generator, which dropout and initial weights draw from."""
        torch.manual_seed(seed)

    def set_threads(self, threads: int | None) -> int:
        """Threads of torch's operators. None: the cores that this process may use."""
        torch.set_num_threads(usable_cores() if threads is None else threads)
        return torch.get_num_threads()

    def synchronize(self, index: int | None = None) -> None:
        """Nothing: operators return when they are done."""

    def memory(self, index: int) -> MemoryUse:
        """Resident memory of this process, and what it may still take."""
        used = psutil.Process().memory_info().rss
        total, free = usable_memory()
        return MemoryUse(total_bytes=total, free_bytes=free, used_bytes=used, reserved_bytes=None, peak_bytes=max(used, _peak_resident()))

    def reset_peak(self, index: int) -> None:
        """Start the peak anew. Where the kernel does not allow it, the peak stays that of the whole process."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
        except OSError:
            return

    def empty_cache(self) -> None:
        """What glibc keeps of freed memory goes back to the system; torch keeps none. Elsewhere: nothing."""
        trim = _of_libc("malloc_trim")
        if trim is not None:
            trim(0)

    def recorder(self, index: int) -> None:
        """Nothing is recorded here."""

    def telemetry(self, index: int) -> Telemetry:
        """Of the whole machine, not of this process. Utilization and power are means since the last call, and unknown at the first."""
        before, self._times = self._times, psutil.cpu_times()
        return Telemetry(
            utilization=None if before is None else busy_share(before, self._times),
            temperature_c=_temperature(),
            power_w=self._power.watts(package_energy(), time.monotonic()),
        )


def return_freed_memory() -> bool:
    """From here on large pieces of memory that are freed go back to the system at once, where the C library is glibc.

    Left to itself it raises the size from which it does so, and what was freed lies in pieces between what is in use: a run that
    computes layers again held a third more. It costs about a tenth of the time. Returns whether it was done.
    """
    return _set_malloc(mmap_threshold=1 << 20, trim_threshold=128 << 10)


def keep_freed_memory() -> bool:
    """From here on pieces of up to 32 MiB that are freed wait for their next use, where the C library is glibc, until 2 GiB are free.

    Left to itself it gives back what is free at the end of the heap, and every step asks for it again, a page at a time: one to three
    percent of a step. `CpuBackend.empty_cache` gives it back. Returns whether it was done.
    """
    return _set_malloc(mmap_threshold=32 << 20, trim_threshold=(2 << 30) - 1)


def _set_malloc(*, mmap_threshold: int, trim_threshold: int) -> bool:
    """In bytes: pieces from which memory is a mapping of its own, and what may be free at the end of the heap. See man mallopt."""
    mallopt = _of_libc("mallopt")
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, mmap_threshold) == mallopt(_M_TRIM_THRESHOLD, trim_threshold) == 1


def _of_libc(name: str) -> Any:
    """A function of glibc; None: another C library, or another system."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def busy_share(before: Any, after: Any) -> float | None:
    """Share of the cores' time between two psutil.cpu_times() in which they worked, 0 to 1. None if no time has passed.

    Waiting for disks is not work. Linux counts the time of guests in user and nice as well.
    """

    def total_and_idle(times: Any) -> tuple[float, float]:
        doubled = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return sum(times) - doubled, times.idle + getattr(times, "iowait", 0.0)

    (total_before, idle_before), (total, idle) = total_and_idle(before), total_and_idle(after)
    passed = total - total_before
    # A counter may go back a little when a core is switched off.
    return min(1.0, max(0.0, 1 - (idle - idle_before) / passed)) if passed > 0 else None


def hottest(sensors: Mapping[str, Sequence[Any]]) -> float | None:
    """Degrees Celsius of the hottest part of the processor among psutil's sensors; None if none is the processor's."""
    for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal"):
        # Tctl is Tdie with something added, made for fans.
        parts = [each for each in sensors.get(chip, ()) if each.label != "Tctl"] or sensors.get(chip, ())
        known = [float(each.current) for each in parts if each.current is not None]
        if known:
            return max(known)
    return None


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    try:
        return hottest(read()) if read else None
    except OSError:
        return None


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel reports it ("AMD EPYC ..."); elsewhere as Python does."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "cpu model") and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "CPU"


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products in bfloat16, which are 2 to 4 times as fast. Not Linux: False."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_flags(cpuinfo))


def multiplies_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether it has instructions for sums of products of eight-bit whole numbers. Not Linux: False."""
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(_flags(cpuinfo))


def _flags(cpuinfo: Path) -> list[str]:
    """What the processor can do, as Linux names it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    return next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), "").split()


def usable_cores(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores this process may run on: its affinity, and no more than the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders(root, membership, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is None or period is None:
            quota, period = _number(folder / "cpu.max"), _number(folder / "cpu.max", word=1)
        if quota and period and quota > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def usable_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """(all, free) bytes that this process may really use: the machine's, or the container's limit where that is lower.

    `ulimit -v` counts too, against the addresses that this process has taken.
    A container sees the machine's memory in /proc/meminfo, but is killed at the limit of its control group (v1 or v2).
    """
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _cgroup_folders(root, membership, "memory"):
        for limit_file, used_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(folder / limit_file)
            if limit is None or limit >= machine.total:
                continue  # v1 writes "no limit" as a number near 2**63
            used = (_number(folder / used_file) or 0) - _entry(folder / "memory.stat", reclaimable)
            total, free = min(total, limit), min(free, max(0, limit - max(0, used)))
    limit = _address_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - psutil.Process().memory_info().vms))
    return total, free


def _address_limit() -> int | None:
    """Bytes of addresses that this process may take (`ulimit -v`); None: no limit, or a system without."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups, v1 and v2, from the innermost up: the tightest limit counts."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []  # not Linux
    folders: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inner = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root  # v2 has no controllers in its line
        if controllers and not base.is_dir():
            base = root / controller
        # In a container the path is often that of the host, and only the root is visible: missing folders have no numbers.
        below = Path(inner.strip().lstrip("/"))
        folders += [base] if ".." in below.parts else [base / part for part in (below, *below.parents)]
    return folders


def _number(path: Path, *, word: int = 0) -> int | None:
    """The integer at `word` of a one-line file; None for "max", for another text, or without the file."""
    try:
        return int(path.read_text().split()[word])
    except (OSError, ValueError, IndexError):
        return None


def _entry(path: Path, key: str) -> int:
    try:
        pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
        return int(pairs.get(key, 0))
    except (OSError, ValueError):
        return 0


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
