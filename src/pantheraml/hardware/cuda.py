"""NVIDIA GPUs, and AMD's through ROCm, which torch addresses by the same name. The only file that spells torch.cuda."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch

from pantheraml.hardware import nvidia
from pantheraml.hardware.backend import MemoryUse, Recorder, Telemetry, set_host_threads
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.speed import matmul_flops, matmul_seconds
from pantheraml.recipe.kinds import Kind

_PROBE_SIZE = 4096
_CUDA_BUILD = "install the CUDA build of torch that fits the driver, as the installation page of PyTorch says"


class CudaBackend:
    """GPUs that torch reaches through CUDA or ROCm."""

    kind: Kind = "cuda"
    engine = "torch"
    collective = "nccl"
    static_shapes = False
    quantizers = ("nf4", "int8", "fp8")
    pinned_memory = True

    def __init__(self) -> None:
        self.attention = ("flash_attention_2", "sdpa", "eager") if find_spec("flash_attn") else ("sdpa", "eager")

    def probe(self) -> tuple[Device | Absent, ...] | Absent:
        """Multiply matrices on each GPU. An old driver, no driver and a torch without CUDA are told apart."""
        if torch.version.cuda is None and torch.version.hip is None:
            return _without_cuda(nvidia.list_cards())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is asked for below
            available = torch.cuda.is_available()
        if not available:
            listing = nvidia.list_cards() if torch.version.hip is None else nvidia.Listing()
            return Absent(
                kind="cuda",
                why=_why_not() + (f" (the driver lists {listing.words})" if listing.cards else ""),
                fix="install or update the GPU's driver until nvidia-smi (rocm-smi) lists the GPU",
                seen=listing.seen,
            )
        return tuple(self._describe_or_why(index) for index in range(torch.cuda.device_count()))

    def _describe_or_why(self, index: int) -> Device | Absent:
        """One GPU that fails (full, lost) must not hide the others."""
        try:
            return self._describe(index)
        except RuntimeError as error:
            return Absent(
                kind="cuda",
                why=f"cuda:{index} ({torch.cuda.get_device_name(index)}) did not answer: {str(error).strip().splitlines()[0]}",
                fix="free its memory if another program holds it, or reset it",
            )

    def _describe(self, index: int) -> Device:
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            # bfloat16 is native from compute capability 8.0 on. Older GPUs have only float16, which needs loss
            # scaling to train; we have none, so they train in float32.
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtypes = ("bfloat16", "float32") if native else ("float32",)
            dtype = torch.bfloat16 if native else torch.float32
            seconds = matmul_seconds(torch.device("cuda", index), dtype, _PROBE_SIZE, self.synchronize)
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(index)
        return Device(
            kind="cuda",
            index=index,
            name=properties.name,
            memory_bytes=total,
            free_bytes=free,
            dtypes=dtypes,
            peak_flops=matmul_flops(seconds, _PROBE_SIZE),
            capability=_capability(properties),
            cores=properties.multi_processor_count,
        )

    def torch_device(self, index: int) -> torch.device:
        """`cuda:index`, which also becomes the current one that synchronize and empty_cache act on."""
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Matrix products in `dtype`. float32: does nothing."""
        return nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype=dtype)

    def seed(self, seed: int) -> None:
        """Set the generators of the CPU and of every GPU."""
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)

    def set_threads(self, threads: int | None) -> int:
        """Torch's own number is kept unless one is given: the work is on the GPU."""
        return set_host_threads(threads)

    def synchronize(self, index: int | None = None) -> None:
        """Wait for a GPU; None: the current one."""
        torch.cuda.synchronize(index)

    def memory(self, index: int) -> MemoryUse:
        """What torch's tensors hold, held at most, and what the driver has left."""
        free, total = torch.cuda.mem_get_info(index)
        return MemoryUse(
            total_bytes=total,
            free_bytes=free,
            used_bytes=torch.cuda.memory_allocated(index),
            reserved_bytes=torch.cuda.memory_reserved(index),
            peak_bytes=torch.cuda.max_memory_allocated(index),
        )

    def reset_peak(self, index: int) -> None:
        """Start the peak anew."""
        torch.cuda.reset_peak_memory_stats(index)

    def empty_cache(self) -> None:
        """Give cached blocks back to the driver."""
        torch.cuda.empty_cache()

    def recorder(self, index: int) -> Recorder:
        """CUDA graphs that share a pool of memory, as they never run at the same time. Not run on a GPU yet."""
        alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

        def record(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            # The allocator lets go of a pool with its last graph.
            pool = next((graph.pool() for graph in alive), None) or torch.cuda.graph_pool_handle()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(index)
            # Other threads may go on asking the driver, as the monitor does.
            try:
                with torch.cuda.device(index), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    result = compute()
            finally:
                torch.cuda.set_stream(stream)  # torch leaves its own one in place where a recording fails
            alive.add(graph)
            return result, graph.replay

        return record

    def telemetry(self, index: int) -> Telemetry:
        """From NVIDIA's driver, the GPU found by its UUID: torch counts only those that are visible. On ROCm from AMD's library."""
        if torch.version.hip is not None:
            return _rocm_telemetry(index)
        return nvidia.telemetry(str(torch.cuda.get_device_properties(index).uuid))


def _without_cuda(listing: nvidia.Listing) -> Absent:
    """What a torch that was built without CUDA can say: the driver, if there is one, tells what is lost."""
    built = f"torch {torch.__version__} was built without CUDA"
    if listing.cards:
        return Absent(kind="cuda", why=f"the driver lists {listing.words}, but {built}", fix=_CUDA_BUILD, seen=listing.seen)
    if listing.trouble:
        return Absent(
            kind="cuda",
            why=f"{built}, and NVIDIA's driver lists no GPU: {listing.trouble}",
            fix=f"repair the driver until nvidia-smi lists the GPU, then {_CUDA_BUILD}",
        )
    return Absent(
        kind="cuda", why=f"{built}, and no NVIDIA driver was found", fix=f"with an NVIDIA GPU install its driver, then {_CUDA_BUILD}"
    )


def _capability(properties: Any) -> str:
    """`9.0` for an H100; on ROCm the architecture, without the features behind it (`gfx942:sramecc+:xnack-`)."""
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"{properties.major}.{properties.minor}"


def _rocm_telemetry(index: int) -> Telemetry:
    """Through torch, which asks the package amdsmi; nothing without it. Not tried on a real GPU."""
    try:
        amdsmi: Any = import_module("amdsmi")
    except (ImportError, KeyError, OSError):  # it looks for ROCm's folder and library while it is imported
        return Telemetry()

    def told(ask: Callable[[int], object]) -> float | None:
        try:
            answer = ask(index)
        except (RuntimeError, OSError, amdsmi.AmdSmiException):
            return None
        return float(answer) if isinstance(answer, int | float) else None  # amdsmi says "N/A" for unknown

    busy = told(torch.cuda.utilization)
    return Telemetry(
        utilization=None if busy is None else busy / 100,
        temperature_c=told(torch.cuda.temperature),
        # torch turns "N/A" into 0 here; amdsmi's unit is the watt, whatever torch's page says.
        power_w=told(torch.cuda.power_draw) or None,
    )


def _why_not() -> str:
    """The driver's own words: none found, too old, or no GPU behind it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "the driver answers, but lists no GPU"
